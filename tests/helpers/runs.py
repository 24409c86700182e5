"""Whole runs of recipes, in this process or one of their own; what they printed and what they left behind."""

import contextlib
import io
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from engine import checkpoint, curves
from engine.loop.metrics import Metrics, read
from recipes import train

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--compile off --no-check-memory --data corpus.txt --sequence 16 --micro-batch 2 --steps 20 --eval-windows 4 "
    "--log-every 1 --size.hidden-size 16 --size.intermediate-size 24 --size.num-hidden-layers 2 "
    "--size.num-attention-heads 2 "
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # tensors so small that two only wait for each other


class Done(NamedTuple):
    code: int
    out: str
    err: str


def corpus(folder: Path, words: int = 3000, seed: int = 0) -> Path:
    """A folder to run in, with a text file in it."""
    draw = random.Random(seed)
    folder.mkdir(exist_ok=True)
    some = ["the", "a", "step", "of", "loss", "grad", "basis", "rank"]
    lines = (" ".join(draw.choices(some, k=8)) for _ in range(words // 8))
    (folder / "corpus.txt").write_text("\n".join(lines))
    return folder


def here(folder: Path, line: str, ends: bool = False) -> Done:
    """`python -m recipes.<line>` in `folder`, but inside this process, which has torch imported already.

    Without `ends` a run draws no picture and no sample once it is over, which would be half of its time.
    """
    recipe, *flags = shlex.split(line)
    with contextlib.ExitStack() as patches:
        if not ends:
            patches.enter_context(mock.patch.object(train, "generate", return_value=[]))
            patches.enter_context(mock.patch.object(curves, "loss_curve", lambda path, *given, **options: path))
        return _module(folder, f"recipes.{recipe}", flags)


def tool(folder: Path, line: str) -> Done:
    """`python -m <line>` in `folder`, but inside this process."""
    module, *flags = shlex.split(line)
    return _module(folder, module, flags)


def _module(folder: Path, module: str, flags: list[str]) -> Done:
    out, err, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    sys.argv, code = [module, *flags], 0
    torch.set_num_threads(1)
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return Done(code, out.getvalue(), err.getvalue())


def start(folder: Path, line: str, **environment: str) -> subprocess.Popen[str]:
    """`python -m recipes.<line>` in `folder`, as users run it."""
    recipe, *flags = shlex.split(line)
    return subprocess.Popen(
        [sys.executable, "-m", f"recipes.{recipe}", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def killed(folder: Path, line: str, behind: str) -> None:
    """`python -m recipes.<line>` in `folder`, killed with SIGKILL as soon as the checkpoint `behind` is there."""
    process = start(folder, line)
    until = time.monotonic() + 240
    while not (folder / behind).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    done = finish(process)
    assert done.code == -signal.SIGKILL and (folder / behind).exists(), done


def interrupted(folder: Path, line: str, step: int) -> None:
    """The same run in this process, which Ctrl-C ends in the step after `step`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        done = here(folder, line)
    assert done.code == 130, done


def cell_here(folder: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """What stands for `subprocess.run` where a comparison's cells run in this process."""

    def inside(process: list[str], stdout: io.TextIOBase, **options: object) -> subprocess.CompletedProcess[str]:
        assert process[:2] == [sys.executable, "-m"] and process[2].startswith("recipes.")
        done = here(folder, shlex.join([process[2].removeprefix("recipes."), *process[3:]]))
        stdout.write(done.out + done.err)
        return subprocess.CompletedProcess(process, done.code)

    return inside


def refused(done: Done, code: int) -> str:
    """The one line with which a run ended."""
    assert done.code == code, (done.out, done.err)
    assert "Traceback" not in done.err + done.out
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def column(folder: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of one scalar in metrics.jsonl."""
    return [(record["step"], record[name]) for record in read(folder) if name in record]


def newest(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.latest(folder)
    assert found.path is not None
    return checkpoint.load(found.path)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do `action` once, when the progress shows `step`."""
    show = Metrics.show

    def shown(self: Metrics, done: int, text: str = "") -> None:
        show(self, done, text)
        if done == step and not text:
            action()

    monkeypatch.setattr(Metrics, "show", shown)


def assert_identical(got: Path, expected: Path, unit: str = "tokens") -> None:
    """Weights, state (also that some is not there), position, head and recorded losses of two runs, to the bit."""
    a, b = newest(got), newest(expected)
    flat = [
        {**one.params, **{f"{name}/{slot}": t for name, slots in one.state.items() for slot, t in slots.items()}}
        for one in (a, b)
    ]
    assert [list(x) for x in flat] == [list(flat[1])] * 2 and list(a.state) == list(b.state)
    for name, t in flat[1].items():
        assert flat[0][name].dtype == t.dtype and flat[0][name].equal(t), name
    assert (a.step, a.header, a.model_config) == (b.step, b.header, b.model_config)
    for key in ("position", unit, "data", "previous_norm"):
        assert a.trainer[key] == b.trainer[key], key
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert column(got, name) == column(expected, name), name
