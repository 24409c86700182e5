"""The schedule's shape, stated as properties over all settings and pinned at a few points."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.schedule import Schedule, factor
from optimizers.contract import UsageError

KINDS = ("cosine", "linear", "constant")


@st.composite
def schedules(draw):
    steps = draw(st.integers(1, 400))
    floor = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return Schedule(steps, draw(st.integers(0, steps)), draw(st.sampled_from(KINDS)), floor)


@given(schedules())
def test_rises_to_one_then_falls_to_the_floor(schedule):
    values = [schedule.factor(step) for step in range(schedule.steps)]
    peak = max(schedule.warmup - 1, 0)
    assert values[peak] == 1
    assert values[0] > 0, "the first step must move"
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in pairwise(values[peak:]))
    end = 1.0 if schedule.kind == "constant" or peak == schedule.steps - 1 else schedule.floor
    assert values[-1] == pytest.approx(end, abs=1e-12)
    assert min(values[peak:]) >= schedule.floor


@given(schedules(), st.integers(0, 1000))
def test_holds_its_last_value_beyond_the_end(schedule, extra):
    assert schedule.factor(schedule.steps + extra) == schedule.factor(schedule.steps - 1)


def test_known_points():
    assert [factor(s, 100, warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(2, 5, kind="linear", floor=0.2) == pytest.approx(0.6)
    assert factor(2, 5, kind="cosine", floor=0.2) == pytest.approx(0.6)
    assert factor(1, 5, kind="cosine") == pytest.approx(0.8535533905932737)
    assert factor(50, 100, kind="constant", floor=0.3) == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 10, "warmup": 11}, "warmup .* got 11"),
        ({"steps": 10, "warmup": -1}, "warmup .* got -1"),
        ({"steps": 10, "floor": 1.5}, "floor .* got 1.5"),
        ({"steps": 10, "kind": "cosin"}, "kind .* got 'cosin'"),
    ],
)
def test_bad_settings_are_named_when_the_schedule_is_made(settings, named):
    with pytest.raises(UsageError, match=named):
        Schedule(**settings)


@given(schedules(), st.integers(0, 50), st.integers(0, 20))
def test_after_a_swap_it_warms_up_again(schedule, swapped, rewarm):
    again = replace(schedule, swapped=swapped, rewarm=rewarm)
    for step in range(swapped + rewarm + 5):
        share = (step - swapped + 1) / rewarm if swapped <= step < swapped + rewarm else 1
        assert again.factor(step) == share * schedule.factor(step)
