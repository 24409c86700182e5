"""A run that stops goes on as if it had not: killed, interrupted, damaged. Or it says why it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, Done, column, corpus, finish, here, newest, refused, start, stop_at

from engine import checkpoint, memory
from engine.loop.metrics import read

# What must resume bitwise: a recipe and its flags, one line each.
RUNS = {
    "adamw": "baseline",
    "sgd": "baseline --optimizer sgd",
    "muon": "baseline --optimizer muon",
    "galore in the middle of a gap": "baseline --optimizer galore --rank 4 --update-proj-gap 7",
    "galore rotating moments": "baseline --optimizer galore --rank 4 --update-proj-gap 5 --moments rotate",
    "clipping by the previous norm": "baseline --clip previous --clip-norm 0.5",
    "two micro-batches": "baseline --accumulation 2",
    "recomputed, two micro-batches": "baseline --accumulation 2 --recompute",
    "bf16, stochastic rounding": "baseline --precision bf16-sr",
    "mixed precision, tied": "baseline --precision mixed --size.tie-word-embeddings True",
    "snsm": "snsm demo --rank 4 --update-proj-gap 7",
    "sumo": "sumo demo --rank 4 --update-proj-gap 7",
    "sumo as the paper has it, bf16": "sumo demo --rank 4 --update-proj-gap 4 --profile paper --precision bf16-sr",
    "sumo, tracked": "sumo demo --rank 4 --update-proj-gap 1 --basis track",
    "rso in the middle of a period": "rso demo --rank 4 --period 7",
    "rso at a turn, shared, transformed": "rso demo --rank 4 --period 4 --share --moments transform --weight-decay 0.1",
    "rso in products, kept, with a penalty": "rso demo --rank 4 --period 5 --form products --moments keep --prox 1e-3",
    "rso warming up after each P": "rso demo --rank 4 --period 5 --turn-warmup 3 --moments transform",
    "rso of galore, Haar": "rso demo --rank 4 --period 5 --inner galore --inner-rank 2 --projection haar",
    "rso of snsm, bf16": "rso demo --rank 4 --period 7 --inner snsm --inner-rank 2 --form products --precision bf16-sr",
    "rso of muon, coordinates": "rso demo --rank 4 --period 7 --inner muon --projection coordinate",
    "lisa": "baseline --optimizer lisa --active 1 --period 5step",
    "omgd in the middle of a mask": "omgd pretrain --active 1 --period 5step",
    "omgd at a turn, scaling updates": "omgd pretrain --active 1 --period 4step --scale-mode update",
    "omgd, everything still training": "omgd pretrain --active 1 --period 3step --mask-warmup 14step",
    "omgd, kept": "omgd pretrain --active 1 --period 5step --state-policy keep",
    "omgd, offloaded": "omgd pretrain --active 1 --period 5step --state-policy offload",
    "omgd, joint": "omgd pretrain --active 1 --period 4step --state-policy keep --order joint",
    "omgd, rates rising in the middle of a turn": (
        "omgd pretrain --active 1 --period 5step --turn-warmup 4 --optimizer sumo --rank 4 --update-proj-gap 7"
    ),
    "lisa, rates rising in the middle of a turn": "baseline --optimizer lisa --active 1 --period 5step --turn-warmup 4",
    "gpt2 under omgd over sumo": "omgd gpt2 --active 1 --period 5step --optimizer sumo --rank 4 --update-proj-gap 7",
    "gpt2 under lisa, documents apart": "baseline gpt2 --optimizer lisa --active 1 --period 5step --documents apart",
    "omgd by norms": "omgd pretrain --choose norms --active 1 --period 4step",
    "omgd by norms over snsm, kept, bf16": (
        "omgd pretrain --choose norms --over snsm --rank 4 --update-proj-gap 7 --active 1 --period 5step "
        "--state-policy keep --precision bf16-sr --recompute"
    ),
    "omgd of tensors": "omgd pretrain --by tensors --keep 0.3 --balance numel --period 5step",
    "omgd of coordinates": "omgd pretrain --by coordinates --keep 0.3 --period 5step",
    "omgd over snsm": "omgd pretrain --over snsm --rank 4 --update-proj-gap 7 --active 1 --period 5step",
    "omgd over sumo": "omgd pretrain --over sumo --rank 4 --update-proj-gap 7 --active 1 --period 5step",
    "omgd over galore": "omgd pretrain --over galore --rank 4 --update-proj-gap 3 --active 1 --period 5step",
}


# One a rule, a wrapper, a precision and a setting of the step; the others vary what these do.
QUICK = {
    *("adamw", "muon", "galore in the middle of a gap", "snsm", "sumo"),
    *("recomputed, two micro-batches", "bf16, stochastic rounding", "mixed precision, tied", "lisa"),
    *("rso in products, kept, with a penalty", "omgd in the middle of a mask", "omgd, joint"),
    *("omgd by norms", "omgd of coordinates", "omgd over sumo"),
}
assert QUICK <= RUNS.keys()


def line(run: str, flags: str = "") -> str:
    return f"{run} {TINY} {flags}"


def assert_same_end(got: Path, expected: Path) -> None:
    """Weights, optimizer state, position and every recorded loss are equal to the bit."""
    a, b = newest(got), newest(expected)
    assert a.step == b.step
    assert list(a.params) == list(b.params) and list(a.state) == list(b.state)
    for name, p in b.params.items():
        assert p.isfinite().all()
        assert a.params[name].equal(p), name
    for name, slots in b.state.items():
        assert a.state[name].keys() == slots.keys()
        for slot, value in slots.items():
            assert a.state[name][slot].dtype == value.dtype
            assert a.state[name][slot].equal(value), f"{name}/{slot}"
    for key in ("position", "tokens", "data", "previous_norm"):
        assert a.trainer[key] == b.trainer[key], key
    assert a.header == b.header
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert column(got, name) == column(expected, name), name


# Going on.


@pytest.mark.run
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in RUNS]
)
def test_twelve_steps_and_a_resume_equal_twenty_steps(tmp_path, case):
    run = line(RUNS[case], "--save-every 12 --eval-every 10")
    straight, resumed = (corpus(tmp_path) / name for name in ("straight", "resumed"))
    done = here(tmp_path, f"{run} --out straight")
    assert done.code == 0, done.err
    moved = {
        n: s for n, s in newest(straight).state.items() if any(t.is_floating_point() and t.any() for t in s.values())
    }
    assert moved or "sgd" in case, "the state that must be carried over is empty"

    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "step-00000020")
    done = here(tmp_path, f"{run} --out resumed --resume auto")
    assert done.code == 0, done.err
    assert "resuming resumed/step-00000012 at step 12\n" in done.out, done.out
    assert_same_end(resumed, straight)
    assert [step for step, _ in column(resumed, "train/loss")] == list(range(1, 21)), "no step is recorded twice"


@pytest.mark.run
def test_a_resume_differs_where_it_should(tmp_path):
    """The comparison above, checked to fail: other random draws, another learning rate."""
    corpus(tmp_path)
    run = line(RUNS["galore in the middle of a gap"], "--save-every 12 --out")
    assert here(tmp_path, f"{run} a").code == here(tmp_path, f"{run} b --seed 1").code == 0
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "b", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "step-00000020")
    done = here(tmp_path, f"{run} c --resume auto --lr 2e-3")
    assert "changed: lr 0.001 -> 0.002" in done.out
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "c", tmp_path / "a")


@pytest.mark.run
def test_a_finished_run_can_be_resumed_and_lengthened(tmp_path):
    run = line("baseline", "--schedule constant --warmup 0 --resume auto --out run")
    first = here(corpus(tmp_path), f"{run} --steps 12")
    assert first.code == 0, "auto starts anew where nothing is"
    again = here(tmp_path, f"{run} --steps 12")
    assert again.code == 0, again.err
    assert column(tmp_path / "run", "train/loss")[-1][0] == 12
    done = here(tmp_path, run)
    assert "at step 12; changed: steps 12 -> 20" in done.out
    assert here(tmp_path, line("baseline", "--schedule constant --warmup 0 --out straight")).code == 0
    a, b = newest(tmp_path / "run"), newest(tmp_path / "straight")
    assert all(a.params[name].equal(p) for name, p in b.params.items())


@pytest.mark.run
def test_a_resume_takes_a_run_or_a_step_by_its_path(tmp_path):
    corpus(tmp_path)
    assert here(tmp_path, line("baseline", "--save-every 12 --out run")).code == 0
    done = here(tmp_path, line("baseline", "--save-every 12 --out a --resume run/step-00000012"))
    assert done.code == 0, done.err
    done = here(tmp_path, line("baseline", "--save-every 12 --out b --resume run"))
    assert done.code == 0 and "at step 20" in done.out, "the newest, from which nothing is left to do"
    assert json.loads((tmp_path / "b" / "result.json").read_text())["eval/loss"] > 0
    a, b = newest(tmp_path / "a"), newest(tmp_path / "run")
    assert all(a.params[name].equal(p) for name, p in b.params.items())


# Stopping.


def wait_for(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    """Until the run has a checkpoint of at least this step."""
    end = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in folder.glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no step {step} in two minutes"
        time.sleep(0.002)


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and SIGINT")
def test_killed_and_interrupted_processes_go_on_as_if_nothing_had_happened(tmp_path):
    """One run, killed once, interrupted once, and resumed each time, against one that was left alone."""
    run = line(
        "baseline", "--optimizer galore --rank 4 --update-proj-gap 7 --steps 300 --save-every 10 --eval-every 100"
    )
    folder = corpus(tmp_path) / "stopped"

    process = start(tmp_path, f"{run} --out stopped --resume auto")
    wait_for(folder, 20, process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    killed_at = newest(folder).step
    assert killed_at >= 20

    process = start(tmp_path, f"{run} --out stopped --resume auto")
    wait_for(folder, killed_at + 40, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    saved = newest(folder)
    assert f"SIGINT: saved stopped/step-{saved.step:08d}; continue with --resume auto" in done.err
    assert f"resuming stopped/step-{killed_at:08d} at step {killed_at}" in done.out
    assert killed_at + 40 <= saved.step < 300
    assert not (folder / "result.json").exists()

    done = finish(start(tmp_path, f"{run} --out stopped --resume auto"))
    assert done.code == 0, done.err
    assert f"resuming stopped/step-{saved.step:08d}" in done.out
    assert here(tmp_path, f"{run} --out straight").code == 0
    assert_same_end(folder, tmp_path / "straight")


@pytest.mark.run
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_the_step_in_hand(tmp_path, monkeypatch, signum, code):
    corpus(tmp_path)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: signal.raise_signal(signum))
        done = here(tmp_path, line("baseline", "--log-every 5 --out run"))
    assert done.code == code
    assert done.err == f"{signum.name}: saved run/step-00000008; continue with --resume auto\n"
    assert f"{signum.name}: saving after this step" in done.out, "said at once: the step in hand may take long"
    assert newest(tmp_path / "run").step == 8, "the signal came when the next step had begun"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert here(tmp_path, line("baseline", "--log-every 5 --out run --resume auto")).code == 0
    assert here(tmp_path, line("baseline", "--log-every 5 --out straight")).code == 0
    a, b = newest(tmp_path / "run"), newest(tmp_path / "straight")
    assert all(a.params[name].equal(p) for name, p in b.params.items())


@pytest.mark.run
def test_a_second_signal_ends_a_run_at_once(tmp_path, monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 7, twice)
    done = here(corpus(tmp_path), line("baseline", "--save-every 5 --out run"))
    assert done.code == 130
    assert done.err == "interrupted; nothing was saved after the last checkpoint\n"
    assert newest(tmp_path / "run").step == 5


# Checkpoints that are damaged or do not fit.


@pytest.mark.run
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    run = line("baseline", "--save-every 5")
    assert here(corpus(tmp_path), f"{run} --out run").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "straight")
    weights = tmp_path / "run" / "step-00000020" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    done = here(tmp_path, f"{run} --out run --resume auto")
    assert done.code == 0, done.err
    (said,) = (text for text in done.out.splitlines() if text.startswith("skipping"))
    assert "step-00000020" in said and "model.safetensors" in said and "truncated" in said
    assert "resuming run/step-00000015 at step 15" in done.out
    assert_same_end(tmp_path / "run", tmp_path / "straight")

    for step in (tmp_path / "run").glob("step-*"):
        (step / "trainer.json").write_text("{")
    done = here(tmp_path, f"{run} --out run --resume auto")
    assert done.code == 0, done.err
    assert sum(text.startswith("skipping") for text in done.out.splitlines()) == 2
    assert "resuming" not in done.out, "nothing is left to go on from"
    assert_same_end(tmp_path / "run", tmp_path / "straight")


UNFIT = {
    "another optimizer": ("--optimizer muon", ["muon", "optimizer state of model.layers.0", "momentum_buffer"]),
    "another rank": ("--optimizer galore --rank 5", ["optimizer state", "basis"]),
    "another sequence": ("--sequence 15", ["--sequence 16"]),
    "other data": ("--data other.txt", ["other data"]),
    "another size": ("--size.hidden-size 20", ["hidden_size is 16, expected 20"]),
    "another precision": ("--precision bf16", ["bfloat16"]),
    "more layers": ("--size.num-hidden-layers 3", ["num_hidden_layers is 2, expected 3"]),
}


@pytest.mark.run
@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_refused_and_the_run_left_as_it_was(tmp_path, case, unfit_run):
    flags, named = UNFIT[case]
    before = {path: path.read_bytes() for path in sorted(unfit_run.rglob("*")) if path.is_file()}
    rule = "" if "--optimizer" in flags else "--optimizer galore --rank 4"
    run = line("baseline", f"{rule} --steps 4 --out run --resume auto {flags}")
    said = refused(here(unfit_run, run), 5)
    assert "step-00000002" in said
    assert all(text in said for text in named if text != "muon"), said
    after = {path: path.read_bytes() for path in sorted(unfit_run.rglob("*")) if path.is_file()}
    changed = {path for path in before | after if before.get(path) != after.get(path) and ".data" not in path.parts}
    assert not changed


@pytest.fixture(scope="module")
def unfit_run(tmp_path_factory) -> Path:
    folder = corpus(tmp_path_factory.mktemp("unfit"))
    (folder / "other.txt").write_text((folder / "corpus.txt").read_text()[::-1])
    done = here(folder, line("baseline", "--optimizer galore --rank 4 --steps 2 --out run"))
    assert done.code == 0, done.err
    return folder


# Losses that are not finite.


def diverged(done: Done) -> str:
    said = refused(done, 4)
    assert "--lr" in said, "it says what to do"
    return said


@pytest.mark.run
@pytest.mark.parametrize("flags", ["", "--log-every 20", "--optimizer muon", "--clip global"])
def test_a_run_that_diverges_names_the_step_and_a_parameter(tmp_path, flags):
    said = diverged(here(corpus(tmp_path), line("baseline", f"--lr 1e30 --warmup 0 --save-every 3 --out run {flags}")))
    step = int(said.removeprefix("error: step ").partition(":")[0])
    assert 2 <= step <= 4
    assert "lm_head.weight" in said or "model." in said, said
    assert all(record["step"] < step for record in read(tmp_path / "run"))


@pytest.mark.run
def test_the_last_good_checkpoint_stays_and_is_named(tmp_path):
    """Good for 10 steps; then the run goes on at an absurd rate."""
    run = line("baseline", "--save-every 5 --schedule constant --warmup 0 --out run")
    assert here(corpus(tmp_path), f"{run} --steps 10").code == 0
    said = diverged(here(tmp_path, f"{run} --resume auto --lr 1e30"))
    assert said.startswith("error: step 12: ")
    assert "run/step-00000010" in said
    saved = newest(tmp_path / "run")
    assert saved.step == 10
    assert all(p.isfinite().all() for p in saved.params.values())
    assert column(tmp_path / "run", "train/loss")[-1][0] == 11, "what was fine is recorded"
    assert here(tmp_path, f"{run} --resume auto").code == 0, "a sane rate goes on from there"


@pytest.mark.run
def test_an_update_that_overflows_is_not_saved(tmp_path):
    """The last step's loss and gradients are finite, its update is not: nothing would notice before the next step."""
    said = diverged(
        here(corpus(tmp_path), line("baseline", "--lr 1e38 --weight-decay 1e9 --warmup 0 --steps 1 --out run"))
    )
    assert said.startswith("error: step 1: its update left ")
    assert "There is no good checkpoint yet" in said
    assert checkpoint.latest(tmp_path / "run").path is None


# Records.


@pytest.mark.run
def test_records_cut_short_by_a_kill_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 2.5}\n{"step": 3, "tra')
    assert [record["step"] for record in read(tmp_path)] == [1, 2]
    assert read(tmp_path / "nowhere") == []


@pytest.mark.run
def test_memory_is_reported_without_a_device(tmp_path):
    corpus(tmp_path)
    assert here(tmp_path, line("baseline", "--steps 2 --out run")).code == 0
    resident = [value for _, value in column(tmp_path / "run", "memory/peak_resident_gib")]
    assert resident and all(0 < value * 2**30 <= memory.peak_bytes(torch.device("cpu")) for value in resident)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["peak_bytes"] > 0
