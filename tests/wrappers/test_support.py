"""The support matrix in docs/choosing.md says what these tests found: each cell is a training that was broken off, read
back from files into another model, and gone on with. `python -m tests.support` writes it anew."""

import json

import pytest

from tests import support

RECORD = json.loads(support.RECORD.read_text())
EVERY = {one.key: one for one in support.combinations()}
PAIRS = sorted({(one.rule, one.wrapper) for one in EVERY.values()})


def check(keys: list[str]) -> None:
    assert keys
    assert {key: support.outcome(EVERY[key]) for key in keys} == {key: RECORD[key] for key in keys}


def eager(rule: str, wrapper: str) -> list[str]:
    return [key for key, one in EVERY.items() if (one.rule, one.wrapper, one.compiled) == (rule, wrapper, False)]


@pytest.mark.run
@pytest.mark.parametrize(("rule", "wrapper"), PAIRS)
def test_a_rule_under_a_wrapper_does_what_the_table_says(rule, wrapper):
    check(eager(rule, wrapper)[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "wrapper"), PAIRS)
def test_and_in_every_precision_with_and_without_recompute(rule, wrapper):
    check(eager(rule, wrapper)[1:])


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("key", [key for key, one in EVERY.items() if one.compiled])
def test_and_compiled(key):
    check([key])


def test_the_table_holds_what_is_run_and_nothing_else():
    assert RECORD.keys() == EVERY.keys(), "run python -m tests.support"
    text = support.PAGE.read_text()
    assert support.page(text, RECORD) == text, "run python -m tests.support"


def test_a_combination_that_fails_would_be_seen(monkeypatch):
    """A table that can only say yes is worth nothing."""
    one = EVERY["adamw/none/fp32/eager/stored"]
    train, calls = support.train, []

    def train_other(step, start, end):
        calls.append(start)
        train(step, start + (len(calls) == 3), end)  # the one that resumes skips a step

    monkeypatch.setattr(support, "train", train_other)
    assert support.outcome(one) == "differs after a resume"
    assert "7 of 9 (1)" in support.table(RECORD | dict.fromkeys(list(EVERY)[:2], "refused: why"))
