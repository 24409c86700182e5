"""The schedule's shape, stated as properties over all settings and pinned at a few points."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.loop.schedule import Schedule, factor, rate_changes
from optimizers.contract import UsageError

KINDS = ("cosine", "linear", "constant", "wsd")


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


def test_multistep_falls_at_its_milestones():
    """As torch's MultiStepLR: from the step on that is the milestone."""
    schedule = Schedule(20, 2, "multistep", milestones=(0.5, 0.75), gamma=0.1)
    values = [schedule.factor(step) for step in (0, 1, 2, 9, 10, 14, 15, 19, 25)]
    assert values == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 10, "warmup": 11}, "warmup .* got 11"),
        ({"steps": 10, "warmup": -1}, "warmup .* got -1"),
        ({"steps": 10, "floor": 1.5}, "floor .* got 1.5"),
        ({"steps": 10, "kind": "cosin"}, "kind .* got 'cosin'"),
        ({"steps": 10, "kind": "wsd", "decay": 0}, "decay-steps .* got 0"),
        ({"steps": 10, "kind": "multistep"}, "milestones: got none with the schedule 'multistep'; give some"),
        ({"steps": 10, "milestones": (0.5,)}, r"milestones: got \[0.5\] with the schedule 'cosine'; it has none; leave"),
        ({"steps": 10, "kind": "multistep", "milestones": (0.7, 0.5)}, "milestones: .* ascending"),
        ({"steps": 10, "kind": "multistep", "milestones": (0.7,), "gamma": 0.0}, "gamma .* got 0.0"),
        ({"steps": 10, "gamma": 0.5}, "gamma: got 0.5 with the schedule 'cosine', which has no milestones"),
        ({"steps": 10, "kind": "multistep", "milestones": (0.7,), "decay": 5}, "decay-steps: got 5, but a multistep"),
        ({"steps": 10, "kind": "wsd", "warmup": 4, "decay": 7}, r"decay-steps must lie in \[1, 6\].* got 7"),
        ({"steps": 10, "kind": "linear", "warmup": 4, "decay": 4}, "decay-steps.*warmup=4, got 4"),
        ({"steps": 10, "kind": "cosine", "decay": 1}, "decay-steps.* got 1"),
        ({"steps": 10, "kind": "constant", "decay": 5}, "decay-steps: got 5, but a constant schedule"),
    ],
)
def test_bad_settings_are_named_when_the_schedule_is_made(settings, named):
    with pytest.raises(UsageError, match=named):
        Schedule(**settings)


@given(st.integers(2, 300), st.integers(0, 300), st.sampled_from(["cosine", "linear"]), st.data())
def test_a_run_lengthened_with_its_old_steps_as_decay_steps_keeps_every_rate(steps, more, kind, data):
    warmup = data.draw(st.integers(0, steps - 1))
    short, long = Schedule(steps, warmup, kind, 0.1), Schedule(steps + more, warmup, kind, 0.1, decay=steps)
    assert [long.factor(s) for s in range(steps + more)] == [short.factor(s) for s in range(steps + more)]
    assert long.factor(steps + more - 1) == (0.1 if steps > max(warmup, 1) else 1)


@given(st.integers(1, 300), st.data())
def test_warmup_stable_decay(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    decay = data.draw(st.integers(1, steps - warmup))
    schedule = Schedule(steps, warmup, "wsd", 0.1, decay)
    values = [schedule.factor(step) for step in range(steps)]
    stable = values[warmup : steps - decay]
    assert set(stable) <= {1.0} and len([v for v in values[warmup:] if v < 1]) == min(decay, steps - max(warmup, 1))
    if steps > max(warmup, 1):
        assert values[-1] == pytest.approx(0.1)
        falls = [a - b for a, b in pairwise(values[max(warmup, 1) - 1 :]) if a - b > 1e-9]
        assert max(falls) - min(falls) < 1e-9, "along a line"
    longer = Schedule(steps + 50, warmup, "wsd", 0.1, decay)
    assert all(longer.factor(s) == values[s] for s in range(steps - decay)), "before its decay nothing tells the length"


def test_by_default_a_tenth_of_the_steps_decays():
    values = [factor(step, 100, warmup=10, kind="wsd", floor=0.2) for step in range(100)]
    assert values[89] == 1 and values[90] == pytest.approx(0.92) and values[99] == pytest.approx(0.2)


def test_rates_are_said_where_they_changed():
    assert rate_changes(300, {"a": 1e-4, "b": 2e-3}, {"a": 1e-4 * (1 + 1e-9), "b": 2e-3, "new": 1.0}) == []
    (said,) = rate_changes(300, {"a": 1e-4, "b": 0.0}, {"a": 5.1e-4, "b": 1e-3})
    assert said.startswith("learning rate at step 301: a 0.0001 -> 0.00051 (x 5.10), b 0 -> 0.001. ")
    assert "--decay-steps" in said and "--schedule wsd" in said


@given(schedules(), st.integers(0, 50), st.integers(0, 20))
def test_after_a_swap_it_warms_up_again(schedule, swapped, rewarm):
    again = replace(schedule, swapped=swapped, rewarm=rewarm)
    for step in range(swapped + rewarm + 5):
        share = (step - swapped + 1) / rewarm if swapped <= step < swapped + rewarm else 1
        assert again.factor(step) == share * schedule.factor(step)
