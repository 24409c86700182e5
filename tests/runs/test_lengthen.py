"""What a resumed run says of its learning rate, and what its lines say of evaluations and speed."""

import itertools
import json
import re
import time
from pathlib import Path

import pytest
from helpers.runs import TINY, column, corpus, here, newest

from engine.loop.metrics import Metrics, read
from engine.step.step import Step

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def cosine(tmp_path_factory) -> Path:
    """A run of ten steps of a cosine from 1e-3 to 1e-4."""
    folder = corpus(tmp_path_factory.mktemp("cosine"))
    done = here(folder, f"baseline {TINY} --steps 10 --out run")
    assert done.code == 0, done.err
    assert "learning rate at step" not in done.out
    return folder


CHANGES = {
    "more steps": ("--steps 20", "0.0001 -> 0.00055 (x 5.50)"),
    "a peak": ("--steps 12 --decay-steps 10 --lr 2e-3", "0.0001 -> 0.0002 (x 2.00)"),
    "a shape": ("--steps 12 --schedule constant", "0.0001 -> 0.001 (x 10.00)"),
    "a shape that is stable": ("--steps 20 --schedule wsd", "0.0001 -> 0.001 (x 10.00)"),
    "a floor": ("--steps 12 --decay-steps 10 --floor 0.5", "0.0001 -> 0.0005 (x 5.00)"),
    "a warm-up": ("--steps 20 --warmup 20", "0.0001 -> 0.00055 (x 5.50)"),
    "a rate of the rest": ("--steps 12 --decay-steps 10 --rest-lr 1e-2", "adamw-rest"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_rate_that_changes_by_resuming_is_said_before_and_after(cosine, tmp_path, case):
    flags, said = CHANGES[case]
    done = here(cosine, f"baseline {TINY} {flags} --resume run --out {tmp_path / 'out'}")
    assert done.code == 0, done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("learning rate at step 11: "))
    assert said in line or case == "a rate of the rest", line
    rates = {name: value for r in read(tmp_path / "out") if r["step"] == 11 for name, value in r.items()}
    for name, _, after in re.findall(r"(\S+) (\S+) -> (\S+?)(?: |,|\.\s|$)", line):
        assert rates[f"train/learning_rate/{name}"] == pytest.approx(float(after), rel=1e-2), line


def test_decay_steps_keep_the_rate_of_a_run_that_is_lengthened(cosine, tmp_path):
    flags = "--steps 20 --decay-steps 10"
    done = here(cosine, f"baseline {TINY} {flags} --resume run --out {tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "learning rate at step" not in done.out
    rates = [value for _, value in column(tmp_path / "out", "train/learning_rate/adamw")]
    assert len(rates) == 10 and rates == pytest.approx([1e-4] * 10)
    assert here(cosine, f"baseline {TINY} --steps 10 --save-every 4 --out stopped").code == 0
    done = here(cosine, f"baseline {TINY} {flags} --resume stopped/step-00000008 --out {tmp_path / 'middle'}")
    assert done.code == 0, done.err
    assert "learning rate at step" not in done.out, "the warm-up is a tenth of the decay's steps, not of the run's"
    first, second = (dict(column(f, "train/learning_rate/adamw")) for f in (cosine / "stopped", tmp_path / "middle"))
    assert {step: second[step] for step in (9, 10)} == {step: first[step] for step in (9, 10)}


def test_a_stable_run_goes_on_from_before_its_decay_without_a_jump(tmp_path):
    corpus(tmp_path)
    line = f"baseline {TINY} --schedule wsd --warmup 2 --decay-steps 4 --save-every 5"
    assert here(tmp_path, f"{line} --steps 10 --out run").code == 0
    done = here(tmp_path, f"{line} --steps 20 --resume run/step-00000005 --out longer")
    assert done.code == 0, done.err
    assert "learning rate at step" not in done.out
    rates = [value for _, value in column(tmp_path / "longer", "train/learning_rate/adamw")]
    assert rates == pytest.approx([1e-3] * 11 + [1e-3 * (1 - 0.9 * k / 4) for k in (1, 2, 3, 4)])
    assert newest(tmp_path / "longer").step == 20


def test_a_line_never_shows_an_older_evaluation_as_if_it_were_of_now(tmp_path, monkeypatch):
    shown: dict[int, str] = {}
    monkeypatch.setattr(Metrics, "show", lambda self, step, text="": shown.update({step: text}))
    assert here(corpus(tmp_path), f"baseline {TINY} --eval-every 8 --out run").code == 0
    evaluated = dict(column(tmp_path / "run", "eval/loss"))
    assert list(evaluated) == [8, 16, 20]
    assert "held-out" not in shown[7]
    for step, line in shown.items():
        if step in evaluated:
            assert f"held-out {evaluated[step]:.4f}  " in line and "at step" not in line, line
        elif step > 8:
            last = max(s for s in evaluated if s < step)
            assert f"held-out {evaluated[last]:.4f}  (at step {last})" in line, line
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"{result['eval/loss']:.4f}" in shown[20], "the last line and the result say the same"


@pytest.mark.parametrize("resumed", [False, True])
def test_the_throughput_leaves_out_what_it_takes_to_compile(tmp_path, monkeypatch, resumed):
    """On a clock of steps: the first one of a process takes 100 s, each other 2 s."""
    folder = corpus(tmp_path)
    if resumed:
        assert here(folder, f"baseline {TINY} --steps 5 --out run").code == 0
    clock, took, call = [0.0], itertools.chain([100.0], itertools.repeat(2.0)), Step.__call__
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def counted(self, *given):
        clock[0] += next(took)
        return call(self, *given)

    monkeypatch.setattr(Step, "__call__", counted)
    done = here(folder, f"baseline {TINY} --log-every 4 --out run --resume auto")
    assert done.code == 0, done.err
    speeds = dict(column(folder / "run", "train/tokens_per_second"))
    own = {step: speed for step, speed in speeds.items() if step > 5 * resumed}
    assert list(own) == ([8, 12, 16, 20] if resumed else [4, 8, 12, 16, 20])
    assert all(speed == 2 * 16 / 2 for speed in own.values()), speeds
