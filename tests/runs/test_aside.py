"""Going on from an earlier step: what came after it is set aside, whole, and nothing mixes the two branches."""

import json
import shutil

import pytest
from helpers.runs import TINY, assert_identical, column, corpus, here, newest

from engine import checkpoint
from engine.checkpoint.aside import set_aside
from engine.loop.metrics import read

RUN = f"baseline {TINY} --log-every 1 --eval-every 5 --save-every 5 --keep-last 9"


def steps(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = corpus(tmp_path_factory.mktemp("trained"))
    assert here(folder, f"{RUN} --out run").code == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.run
def test_the_branch_that_is_left_is_set_aside_and_the_new_one_is_the_run(folder):
    done = here(folder, f"{RUN} --resume run/step-00000010 --steps 13 --schedule constant")
    assert done.code == 0, done.err
    run, aside = folder / "run", folder / "run" / "aside-1"
    assert "going on from step 10: steps 15, 20 and " in done.out and "are set aside in run/aside-1\n" in done.out
    assert steps(run) == [5, 10, 13] and steps(aside) == [15, 20]
    assert "checkpoint   run/step-00000013" in done.out
    assert checkpoint.latest(run).path == run / "step-00000013"
    assert [step for step, _ in column(run, "train/loss")] == list(range(1, 14))
    assert [step for step, _ in column(aside, "train/loss")] == list(range(11, 21))
    assert json.loads((run / "result.json").read_text())["steps"] == 13
    assert json.loads((aside / "result.json").read_text())["steps"] == 20
    assert checkpoint.latest(aside).path == aside / "step-00000020", "nothing is lost: it can be used as it was"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 14))

    again = here(folder, f"{RUN} --out run --resume auto --steps 16 --schedule constant")
    assert "resuming run/step-00000013" in again.out and "set aside" not in again.out
    assert here(folder, f"{RUN} --resume run/step-00000005 --steps 6 --schedule constant").code == 0
    assert steps(run) == [5, 6] and steps(run / "aside-2") == [10, 13, 15, 16]


@pytest.mark.run
def test_in_another_folder_what_is_there_is_set_aside_whole(folder):
    line = f"{RUN} --resume run/step-00000010 --out other"
    assert here(folder, line).code == 0
    first = read(folder / "other")
    done = here(folder, line)
    assert done.code == 0 and "are set aside in other/aside-1" in done.out, done
    assert steps(folder / "other") == steps(folder / "other" / "aside-1") == [15, 20]
    assert [r["step"] for r in read(folder / "other")] == [r["step"] for r in first]
    assert steps(folder / "run") == [5, 10, 15, 20], "the run it comes from stays as it is"
    assert_identical(folder / "other", folder / "other" / "aside-1")


@pytest.mark.run
def test_after_a_crash_nothing_is_set_aside_and_no_record_is_twice(folder):
    run = folder / "run"
    shutil.rmtree(run / "step-00000020")
    shutil.rmtree(run / "step-00000015")
    done = here(folder, f"{RUN} --out run --resume auto")
    assert done.code == 0 and "set aside" not in done.out
    assert [step for step, _ in column(run, "train/loss")] == list(range(1, 21))
    assert not list(run.glob("aside*"))


@pytest.mark.run
def test_records_of_a_run_that_ended_before_its_first_checkpoint_are_not_lost(folder):
    run = folder / "run"
    for path in run.glob("step-*"):
        shutil.rmtree(path)
    before = (run / "metrics.jsonl").read_text()
    done = here(folder, f"{RUN} --out run --steps 3")
    assert done.code == 0 and "another run: no checkpoint and" in done.out, done
    assert (run / "aside-1" / "metrics.jsonl").read_text() == before
    assert newest(run).step == 3


def test_a_damaged_newer_checkpoint_is_set_aside_too(tmp_path):
    for name in ("step-00000001", "step-00000002", ".old-step-00000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\nrubbish\n{"st')
    said = set_aside(tmp_path, 1)
    assert said is not None and "steps 2, 3 and 3 records" in said
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert sorted(p.name for p in (tmp_path / "aside-1").glob("*step*")) == [".old-step-00000003", "step-00000002"]
    assert set_aside(tmp_path, 1) is None


def test_a_line_that_a_full_disk_cut_hides_no_later_one(tmp_path):
    from rich.console import Console

    from engine.loop.metrics import Metrics

    metrics = Metrics(tmp_path, 0, 10, Console())
    metrics.log(1, {"train/loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "trai')
    metrics.log(3, {"train/loss": 1.0})
    assert [r["step"] for r in read(tmp_path)] == [1, 3]


@pytest.mark.run
def test_a_finished_run_copied_to_another_folder_is_whole_there(folder):
    done = here(folder, f"{RUN} --out other --resume run")
    assert done.code == 0, done
    assert "nothing is left to train: all 20 steps are done" in done.out
    assert "checkpoint   other/step-00000020\n" in done.out
    assert steps(folder / "other") == [20] and steps(folder / "run") == [5, 10, 15, 20]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        there, here_too = (folder / run / "step-00000020" / name for run in ("run", "other"))
        assert there.read_bytes() == here_too.read_bytes()


@pytest.mark.run
def test_fewer_steps_than_are_done_is_refused_before_anything_is_touched(folder):
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    for flags in ("--out run --resume auto", "--resume run", "--resume run/step-00000020 --out other"):
        done = here(folder, f"{RUN} {flags} --steps 17")
        assert done.code == 2 and "--steps 17: " in done.err and "has done 20 already" in done.err, done
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
    assert not (folder / "other").exists()


@pytest.mark.run
def test_a_step_that_is_not_there_is_said_with_those_that_are(folder):
    done = here(folder, f"{RUN} --resume run/step-00000099")
    assert done.code == 2 and "run/step-00000099 is not there; run has step-00000005, step-00000010" in done.err, done


@pytest.mark.run
def test_what_differs_is_named_by_its_flag(folder):
    """Not by what follows from it, such as the shape of some optimizer's state."""
    for flags, said in (
        ("--size.hidden-size 32", "another model: hidden_size is 16, expected 32"),
        ("--precision bf16", "resume with the --precision it was trained in"),
    ):
        done = here(folder, f"{RUN} --resume run/step-00000010 --out other {flags}")
        assert done.code == 5 and said in done.err, done
