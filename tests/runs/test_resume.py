"""A run resumed from any of its steps ends as if it had never stopped; and checkpoints come and go as they should."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import ONE_THREAD, ROOT, TINY, assert_identical, column, corpus, here, newest, refused, stop_at

from engine import checkpoint
from engine.checkpoint import CheckpointError, WriteError, store
from engine.checkpoint.saver import Saver
from engine.loop.metrics import Metrics
from optimizers.contract import UsageError

STEPS = 10
SHORT = f"{TINY} --steps {STEPS} --eval-every 4 --save-every 1 --keep-every 1"
TEXT = 60  # words to train on: the data end within such a run, in the middle of a batch

# A recipe and its flags; each run is resumed from every one of its steps: the one before a refresh of all bases, before
# a refresh of some, before a turn, in the middle of a gap, with a batch that the data's end splits.
EVERYWHERE = {
    "all bases at once": "baseline --optimizer galore --rank 4 --update-proj-gap 5 --no-stagger",
    "bases in turn, two micro-batches": "snsm demo --rank 4 --update-proj-gap 4 --accumulation 2 --clip previous",
    "a mask at each turn": "omgd pretrain --active 1 --period 2step",
    "a subspace at each turn": "rso demo --rank 4 --period 3 --form products",
    "in the background": "snsm demo --rank 4 --update-proj-gap 4 --moments rotate --precision bf16-sr --save-async on",
}

FAST = ("a mask at each turn", "in the background")  # from a few of their steps; from every one of them it is slow
FEW = (3, 4, 6)  # before a refresh of the bases, after one, and at a turn in the second epoch


def run_in(folder: Path, flags: str) -> str:
    """The output of a run that must succeed."""
    done = here(folder, flags)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.run
@pytest.mark.parametrize(
    ("case", "resumed"),
    [
        *((case, FEW) for case in FAST),
        *(pytest.param(case, range(1, STEPS), marks=pytest.mark.slow) for case in EVERYWHERE),
    ],
)
def test_a_run_goes_on_from_every_step(tmp_path, case, resumed):
    line = f"{EVERYWHERE[case]} {SHORT}"
    (corpus(tmp_path, TEXT) / "held.txt").write_text("the basis of a step " * 10)
    line += " --validation held.txt"
    said = run_in(tmp_path, f"{line} --out straight")
    epochs = float(said.split(" epochs")[0].split()[-1])
    assert epochs > 1, "no epoch ends within the run"
    for step in resumed:
        part = tmp_path / f"part-{step}"
        part.mkdir()
        shutil.copytree(tmp_path / "straight" / f"step-{step:08d}", part / f"step-{step:08d}")
        lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (part / "metrics.jsonl").write_text("".join(lines))
        assert f"at step {step}\n" in run_in(tmp_path, f"{line} --out {part.name} --resume auto")
        assert_identical(part, tmp_path / "straight")
        shutil.rmtree(part)


@pytest.mark.run
def test_a_signal_between_two_micro_batches_is_heard_after_the_step(tmp_path, monkeypatch):
    """Gradients of half a step are never saved: the step is finished first."""
    import signal

    from engine.data import Batches

    run, calls, batch = f"baseline {TINY} --accumulation 3", [], Batches.batch

    def counted(self, first, count):
        calls.append(first)
        if len(calls) == 3 * 4 + 2:  # the second of the three micro-batches of step 5
            signal.raise_signal(signal.SIGTERM)
        return batch(self, first, count)

    corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", counted)
        assert here(tmp_path, f"{run} --out run").code == 143
    assert newest(tmp_path / "run").step == 5
    run_in(tmp_path, f"{run} --out run --resume auto")
    run_in(tmp_path, f"{run} --out straight")
    assert_identical(tmp_path / "run", tmp_path / "straight")


# Which checkpoints stay.


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_every_nth_checkpoint_is_kept_for_ever(tmp_path):
    run_in(corpus(tmp_path), f"baseline {TINY} --save-every 3 --keep-last 2 --keep-every 6 --out run")
    assert steps(tmp_path / "run") == [6, 12, 18, 20]
    assert "--keep-every" in refused(here(tmp_path, f"baseline {TINY} --keep-every -1 --out b"), 2)


def test_what_lies_after_the_step_in_hand_neither_counts_nor_goes(tmp_path):
    """A run that goes on from an older checkpoint must not lose the new one because a damaged one is newer."""
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, {}, {}, {}, {})
    gone = checkpoint.prune(tmp_path, 1, upto=2)
    assert ([path.name for path in gone], steps(tmp_path)) == (["step-00000001"], [2, 30])
    assert checkpoint.prune(tmp_path, 1, keep_every=2) == [] and steps(tmp_path) == [2, 30]
    with pytest.raises(UsageError):
        checkpoint.prune(tmp_path, 0)


def test_what_cannot_be_deleted_is_said_and_stays(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", refuse)
        said = run_in(tmp_path, f"baseline {TINY} --steps 2 --save-every 1 --keep-last 1 --out run")
    assert "step-00000002 is saved, but older checkpoints cannot be deleted" in said and "Permission denied" in said
    assert newest(tmp_path / "run").step == 2


# Writing in the background.


def test_what_changes_after_the_save_is_not_in_it(tmp_path, monkeypatch):
    """The weights move on while they are written: what is written is what they were. Tied ones stay one."""
    go = threading.Event()
    write = checkpoint.save

    def held(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(store, "save", held)
    w = torch.zeros(1000)
    background = Saver(tmp_path, 1, 0, background=True)
    background.save(1, {"a": w, "b": w}, {"a": {"m": w}}, {}, {}, {})
    w.fill_(1)
    go.set()
    assert background.wait() is None
    found = checkpoint.load(tmp_path / "step-00000001")
    assert not found.params["a"].any() and not found.state["a"]["m"].any()
    assert found.params["a"] is found.params["b"]


@pytest.mark.run
def test_a_save_in_the_background_takes_no_longer_than_the_copy(tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(1)
        return tmp_path

    monkeypatch.setattr(store, "save", slow)
    params = {"w": torch.zeros(1_000_000)}
    for background in (True, False):
        one = Saver(tmp_path, 1, 0, background)
        start = time.monotonic()
        one.save(1, params, {}, {}, {}, {})
        assert (time.monotonic() - start < 0.5) == background
        with pytest.raises(AssertionError, match="wait"):
            one.save(2, params, {}, {}, {}, {})
        assert one.wait() is None
        assert time.monotonic() - start >= 1, "waited for"


@pytest.mark.parametrize("background", [False, True])
def test_what_cannot_be_saved_is_an_error_in_either_way(tmp_path, background):
    one = Saver(tmp_path, 1, 0, background)
    with pytest.raises(CheckpointError, match="w: .*not contiguous"):  # noqa: PT012 (one or the other)
        one.save(1, {"w": torch.zeros(2, 3).T}, {}, {}, {}, {})
        one.wait()
    with pytest.raises(CheckpointError, match="Tensor"):  # noqa: PT012
        one.save(1, {}, {}, {"lr": torch.zeros(1)}, {}, {})
        one.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--save-async off", "--save-async on"])
def test_a_run_ends_with_all_its_checkpoints_written(tmp_path, monkeypatch, flags):
    """However it ends: by its last step, a signal, a loss that is not finite, an error."""
    write = checkpoint.save

    def slow(*arguments):
        time.sleep(0.2)
        return write(*arguments)

    corpus(tmp_path)
    monkeypatch.setattr(store, "save", slow)
    run_in(tmp_path, f"baseline {TINY} --steps 4 --save-every 3 {flags} --out a")
    assert steps(tmp_path / "a") == [3, 4]

    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        done = here(tmp_path, f"baseline {TINY} --save-every 3 {flags} --out b")
        assert (done.code, steps(tmp_path / "b")) == (130, [3])

    line = f"baseline {TINY} --schedule constant --warmup 0 {flags} --out c"
    run_in(tmp_path, f"{line} --steps 3")
    said = refused(here(tmp_path, f"{line} --resume auto --lr 1e30 --save-every 4"), 4)
    assert f"c/step-{steps(tmp_path / 'c')[-1]:08d}" in said


# A full disk.


def full(monkeypatch: pytest.MonkeyPatch, *refusing: int) -> None:
    """A disk with no room for the checkpoints of these steps."""
    write = store.write_json

    def writing(file, content):
        if content.get("step") in refusing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write(file, content)

    monkeypatch.setattr(store, "write_json", writing)


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--save-async off", "--save-async on"])
def test_a_run_goes_on_when_the_disk_is_full_and_says_so(tmp_path, monkeypatch, flags):
    line = f"baseline {TINY} --save-every 5 {flags}"
    corpus(tmp_path)
    with monkeypatch.context() as patch:
        full(patch, 10, 15)
        said = run_in(tmp_path, f"{line} --out run")
    warnings = [text for text in said.splitlines() if text.startswith("warning")]
    assert len(warnings) == 2 and all("No space left on device" in text for text in warnings)
    assert all("run/step-00000005; the run goes on" in text for text in warnings), "it names what is left"
    assert steps(tmp_path / "run") == [5, 20]
    run_in(tmp_path, f"{line} --out straight")
    assert_identical(tmp_path / "run", tmp_path / "straight")
    assert not list((tmp_path / "run").glob(".*step*"))


@pytest.mark.run
def test_numbers_that_find_no_room_do_not_end_a_run(tmp_path, monkeypatch):
    log = Metrics.log

    def full_at_seven(self: Metrics, step: int, scalars: dict[str, float]) -> None:
        if step == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, step, scalars)

    monkeypatch.setattr(Metrics, "log", full_at_seven)
    said = run_in(corpus(tmp_path), f"baseline {TINY} --out run")
    assert "warning: the numbers of step 7 are not recorded" in said and "No space left" in said
    assert [step for step, _ in column(tmp_path / "run", "train/loss")] == [*range(1, 7), *range(8, 21)]


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--save-async off", "--save-async on"])
def test_a_run_whose_last_checkpoint_finds_no_room_fails_and_can_go_on(tmp_path, monkeypatch, flags):
    line = f"baseline {TINY} --save-every 5 {flags} --out run"
    corpus(tmp_path)
    with monkeypatch.context() as patch:
        full(patch, 20)
        said = refused(here(tmp_path, line), 5)
        assert "step 20, the last, is not saved" in said and "No space left" in said and "run/step-00000015" in said
        stop_at(patch, 17, lambda: __import__("signal").raise_signal(15))
        full(patch, 18)
        said = refused(here(tmp_path, f"{line} --resume auto"), 5)
        assert "step 18, the last, is not saved" in said and "run/step-00000015" in said
    assert "at step 15" in run_in(tmp_path, f"{line} --resume auto")


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_limit_on_the_size_of_files_is_such_a_disk(tmp_path):
    """The system itself refuses, in the middle of the weights."""
    code = (
        "import resource, sys, torch; from engine.checkpoint import *; from pathlib import Path\n"
        "root = Path(sys.argv[1]); save(root, 1, {'w': torch.zeros(10)}, {}, {}, {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: save(root, 2, {'w': torch.zeros(1_000_000)}, {}, {}, {})\n"
        "except WriteError as error: print(error)\n"
        "assert latest(root).path == root / 'step-00000001' and not latest(root).damaged\n"
        "assert [p.name for p in root.iterdir()] == ['step-00000001'], list(root.iterdir())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: cannot be written" in done.stdout and "File too large" in done.stdout


def test_a_folder_that_takes_nothing_is_a_disk_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written"):
        checkpoint.save(tmp_path / "file", 1, {}, {}, {}, {})


# What a checkpoint of another run is refused for.


@pytest.mark.run
def test_another_model_of_the_same_shapes_is_refused(tmp_path):
    """Four heads of 4 or two of 8: every tensor fits, and the model is another one."""
    run = f"baseline {TINY} --steps 4 --out run"
    run_in(corpus(tmp_path), run)
    said = refused(here(tmp_path, f"{run} --resume auto --size.num-attention-heads 4"), 5)
    assert "config.json: another model" in said and "num_attention_heads is 2, expected 4" in said
    copy = tmp_path / "copy" / "step-00000004"
    shutil.copytree(tmp_path / "run" / "step-00000004", copy.with_name("step-00000009"))
    said = refused(here(tmp_path, f"{run.replace('--out run', '--out copy')} --resume copy/step-00000009"), 5)
    assert "is of step 4, but lies in step-00000009" in said


# The look at the state that a run takes now and then.


@pytest.mark.run
def test_a_run_looks_at_its_state_at_the_interval(tmp_path):
    line = f"baseline --optimizer galore --rank 4 --update-proj-gap 5 {TINY} --precision bf16"
    run_in(corpus(tmp_path), f"{line} --inspect-every 8 --log-every 20 --out run")
    errors = column(tmp_path / "run", "optim/galore/basis_error")
    assert [step for step, _ in errors] == [8, 16] and all(0 <= value < 1e-5 for _, value in errors)
    (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
    for name in ("optim/galore/first_stable_rank", "optim/adamw/update_rms", "optim/adamw/update_lost"):
        assert name.encode() in events.read_bytes()
        assert all(value > 0 for _, value in column(tmp_path / "run", name)), name
    assert column(tmp_path / "run", "optim/galore/active_share") == [(8, 1.0), (16, 1.0)]
    run_in(tmp_path, f"{line} --out blind")
    a, b = newest(tmp_path / "run"), newest(tmp_path / "blind")
    assert all(a.params[name].equal(p) for name, p in b.params.items()), "looking changes nothing"
    assert not column(tmp_path / "blind", "optim/adamw/update_rms")


@pytest.mark.run
def test_nothing_is_pickled(tmp_path, monkeypatch):
    """By any of the ways that torch or Python have: each is made to fail."""
    import pickle

    def refuse(*arguments, **options):
        raise AssertionError("pickle is used")

    for module, names in (
        (pickle, ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    line = f"baseline {TINY} --save-every 10 --save-async on --inspect-every 10 --out run"
    run_in(corpus(tmp_path), line)
    os.truncate(tmp_path / "run" / "step-00000020" / "model.safetensors", 10)
    assert "at step 10" in run_in(tmp_path, f"{line} --resume auto")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and "tokenizer" not in path.parts]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".png"} | {
        path.suffix for path in files if "tfevents" in path.name
    }
    assert not any(path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for path in files)
