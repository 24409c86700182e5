"""What a resumed run reads: every row of a pass once, or it says why not."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.runs import TINY, corpus, here, newest, refused
from helpers.texts import prepared
from torch import nn

from engine.checkpoint import CheckpointError
from engine.data import Tokens
from engine.loop.position import read_ahead, read_on, saved_order
from engine.tasks.language import LanguageTask

VALUES: dict[str, Any] = {
    "seed": (0, 1),
    "sequence": (4, 3),
    "text": ("a", "b"),
    "step": (1, 2, 4, 6),
    "whole": (0, 1),
}


class Run(NamedTuple):
    """Settings that may change between two commands. `step`: rows of one; `whole`: passes begin with a step."""

    seed: int
    sequence: int
    text: str
    step: int
    whole: int


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    some = {"a": "abcdefghijklmnopqrstuvwxyz012345", "b": "bacdefghijklmnopqrstuvwxyz012345"}
    return {name: prepared(tmp_path_factory.mktemp(name), text) for name, text in some.items()}


def task(run: Run, texts: dict[str, Path]) -> LanguageTask:
    train, held_out = (Tokens(texts[run.text], split) for split in ("train", "validation"))
    align = run.step if run.whole else 1
    return LanguageTask(nn.Linear(1, 1), train, held_out, run.sequence, config={}, seed=run.seed, align=align)


def rows(of: LanguageTask, first: int, last: int) -> Counter[int]:
    """The windows at positions first, ..., last - 1, without blanks."""
    return Counter(int(k) for k in of.train.which(first, last - first) if k >= 0)


@pytest.mark.run
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_every_row_of_a_pass_is_read_once_whatever_was_changed_or_the_change_is_refused(texts, steps):
    """The whole grid: each setting, and each pair of them, from every one of its values to every other."""
    every = {run: task(run, texts) for run in (Run(*values) for values in itertools.product(*VALUES.values()))}
    outcomes: Counter[str] = Counter()
    for before, after in itertools.product(every, every):
        if sum(a != b for a, b in zip(before, after, strict=True)) > 2:
            continue
        old, new, position = every[before], every[after], steps * before.step
        same_order = before[:3] == after[:3]
        what = f"{before} -> {after} at {position}"
        refusal = ""
        try:
            there = read_on(Path("step-1"), new, saved_order(old), position).position
        except CheckpointError as error:
            refusal = str(error)
        if refusal:
            outcomes["refused"] += 1
            changed = [n for n in ("seed", "sequence") if getattr(before, n) != getattr(after, n)]
            assert all(f"--{n} {getattr(before, n)}, got {getattr(after, n)}" in refusal for n in changed), refusal
            assert "--reorder" in refusal and ("--data" in refusal) == (before.text != after.text), refusal
            again = read_on(Path("step-1"), new, saved_order(old), position, reorder=True)
            assert again.said, what
            if same_order:  # the rows that are left are no whole steps
                assert after.whole and min(position % old.epoch, old.rows) % after.step, what
            else:
                assert again.position % new.epoch == 0 and again.position >= position, "a new pass begins"
        else:
            outcomes["went on"] += 1
            assert same_order, what
            assert not after.whole or there % after.step == 0, f"{what}: a step straddles two passes"
            if steps:
                ended = (position - 1) // old.epoch  # the pass that the last row read belongs to
                assert there <= (ended + 1) * new.epoch, what
                left = rows(new, there, (ended + 1) * new.epoch) if there % new.epoch else Counter()
                assert rows(old, ended * old.epoch, position) + left == Counter(range(new.rows)), what
    assert outcomes["refused"] > 100 and outcomes["went on"] > 100, outcomes


def test_a_swap_may_skip_rows_and_says_so(texts):
    old, new = (task(Run(0, 4, "a", step, whole), texts) for step, whole in ((3, 0), (4, 1)))
    with pytest.raises(CheckpointError, match="1 of the rows that are left would be skipped"):
        read_on(Path("step-1"), new, saved_order(old), 3)
    assert read_on(Path("step-1"), new, saved_order(old), 3, swapped=True) == (
        4,
        "1 rows of this pass over the data are skipped, to end it in whole steps",
    )


def test_an_order_that_a_file_does_not_tell_is_refused(texts):
    mine = task(Run(0, 4, "a", 2, 0), texts)
    whole = saved_order(mine)
    for name in whole:
        for value in (None, "x", -1, 0.5, [], True):
            if value == whole[name] and type(value) is type(whole[name]):
                continue
            with pytest.raises(CheckpointError, match=f"--{name} |begins with a step of 1 rows, was -1"):
                read_on(Path("step-1"), mine, {**whole, name: value}, 2)
        with pytest.raises(CheckpointError, match=f"--{name} None"):
            read_on(Path("step-1"), mine, {k: v for k, v in whole.items() if k != name}, 2)


# From the command line.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Runs of four steps."""
    folder = corpus(tmp_path_factory.mktemp("stopped"))
    (folder / "other.txt").write_text((folder / "corpus.txt").read_text()[::-1])
    for name, recipe in (("adamw", "baseline"), ("omgd", "omgd pretrain --active 1 --period 2step")):
        done = here(folder, f"{recipe} {TINY} --steps 4 --out {name}")
        assert done.code == 0, done.err
    return folder


REFUSED = {
    "seed": ("adamw", "baseline", "--seed 1", ["--seed 0, got 1"]),
    "data": ("adamw", "baseline", "--data other.txt", ["--data ", "other data"]),
    "sequence": ("adamw", "baseline", "--sequence 15", ["--sequence 16, got 15"]),
    "batch where passes begin with one": (
        "omgd",
        "omgd pretrain --active 1 --period 2step",
        "--micro-batch 3",
        ["begins with a step of 3 rows, was 2", "1 of the rows that are left would be skipped"],
    ),
    "accumulation where passes begin with a step": (
        "omgd",
        "omgd pretrain --active 1 --period 2step",
        "--accumulation 3",
        ["begins with a step of 6 rows, was 2", "4 of the rows that are left would be skipped"],
    ),
}


@pytest.mark.run
@pytest.mark.parametrize("case", REFUSED)
def test_what_breaks_the_order_is_refused_and_reorder_begins_a_new_pass(stopped, tmp_path, case):
    run, recipe, flags, named = REFUSED[case]
    line = f"{recipe} {TINY} {flags} --steps 6 --resume {run} --out {tmp_path / 'out'}"
    done = here(stopped, line)
    said = refused(done._replace(err=done.err[done.err.rindex("error: ") :]), 5)  # below a warning of OMGD's
    assert all(text in said for text in [*named, "--reorder", "step-00000004"]), said
    assert not (tmp_path / "out").exists()
    done = here(stopped, f"{line} --reorder")
    assert done.code == 0, done.err
    assert ("a new pass over the data begins" in done.out) or ("rows of this pass" in done.out), done.out
    after = newest(tmp_path / "out").trainer
    size = {"--micro-batch 3": 3, "--accumulation 3": 6}.get(flags, 2)
    assert after["tokens"] == 4 * 2 * 16 + 2 * size * int(after["config"]["sequence"])


@pytest.mark.run
@pytest.mark.parametrize(
    ("flags", "size"), [("--micro-batch 3", 3), ("--accumulation 2", 4), ("--micro-batch 1 --accumulation 5", 5)]
)
def test_a_batch_that_is_only_a_count_of_rows_may_change_and_is_said(stopped, tmp_path, flags, size):
    done = here(stopped, f"baseline {TINY} {flags} --steps 6 --resume adamw --out {tmp_path / 'out'}")
    assert done.code == 0, done.err
    assert "changed: " in done.out and ("micro_batch 2 -> " in done.out or "accumulation 1 -> " in done.out)
    after = newest(tmp_path / "out").trainer
    assert after["position"] == 4 * 2 + 2 * size and after["tokens"] == after["position"] * 16


def test_what_is_read_ahead_of_a_joint_order():
    assert read_ahead(lambda step: step, 1000) == []
    cycle = [3, 0, 2, 1]
    batch = lambda step: step // 4 * 4 + cycle[step % 4]  # noqa: E731
    assert [read_ahead(batch, done) for done in range(4, 9)] == [[], [7], [7], [7], []]


@pytest.mark.run
def test_a_joint_order_goes_on_with_its_own_batches_only(tmp_path):
    """Inside a cycle the batches that are left lie on both sides of the position: no other size of batch has them."""
    folder = corpus(tmp_path / "joint")
    joint = f"omgd pretrain {TINY} --active 1 --period 8step --order joint --state-policy keep"
    assert here(folder, f"{joint} --steps 6 --out run").code == 0
    for flags in ("--micro-batch 4", "--accumulation 2", "--micro-batch 1"):
        done = here(folder, f"{joint} --steps 8 --resume run --out out {flags}")
        said = refused(done._replace(err=done.err[done.err.rindex("error: ") :]), 5)
        assert "rows of the cycle in hand" in said and "--reorder" in said and "was 2" in said, said
    assert not (folder / "out").exists()
    same = here(folder, f"{joint} --steps 8 --resume run --out same --micro-batch 1 --accumulation 2")
    assert same.code == 0 and "are read twice" not in same.out, same
    for flags in (f"{joint} --micro-batch 4 --reorder", f"baseline {TINY} --swap convert"):
        done = here(folder, f"{flags} --steps 8 --resume run --out {tmp_path / 'out'} ")
        assert done.code == 0 and "rows of the cycle in hand" in done.out, done
