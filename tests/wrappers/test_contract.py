"""The contract of an optimizer: every wrapper over a rule of every file of the registry, and none.

Both lists are those of tests/support.py. What a rule promises stands in tests/rules/test_rules.py.
"""

import pytest
import torch
from helpers.grids import covering

from engine.step.step import Step
from optimizers.contract import UsageError
from tests.support import RULES, STEPS, WRAPPERS, Combination, step_of, train

Described = dict[str, dict[str, tuple[torch.Size, torch.dtype]]]


def made(rule: str, wrapper: str) -> Step:
    try:
        return step_of(Combination(rule, wrapper), seed=0)
    except UsageError as error:
        pytest.skip(f"refused: {error}")


def described(state: dict[str, dict[str, torch.Tensor]]) -> Described:
    return {key: {slot: (t.shape, t.dtype) for slot, t in slots.items()} for key, slots in state.items()}


each_combination = pytest.mark.parametrize(("rule", "wrapper"), covering(RULES, WRAPPERS))
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


@each_combination
def test_after_any_step_the_state_is_what_a_resumed_run_expects(rule, wrapper):
    step = made(rule, wrapper)
    for done in range(STEPS + 1):
        shared = {key: step.state[key] for key in step.optimizer.shared}
        expected = described(step.optimizer.init(step.params, done, shared))
        assert described(step.state) == expected and list(step.state) == list(expected), done
        assert all(t.is_contiguous() and not t.is_meta for slots in step.state.values() for t in slots.values())
        train(step, done, done + 1)
    assert all(p.isfinite().all() for p in step.params.values())


@each_combination
def test_what_an_optimizer_says_of_a_model_is_of_this_model(rule, wrapper):
    step = made(rule, wrapper)
    optimizer, params = step.optimizer, step.params
    assert optimizer.owner.keys() == params.keys(), "everything has an owner"
    for done in range(STEPS):
        train(step, done, done + 1)
        trainable, frozen = optimizer.split(params, step.state)
        assert not trainable.keys() & frozen.keys()
        assert {optimizer.parameter_of(name) for name in trainable} <= params.keys()
        assert (
            step.state.keys() <= params.keys() | optimizer.shared.keys()
            and set(optimizer.due(done, step.state)) <= params.keys()
        )
        merged = optimizer.merge(dict(params), step.state)
        assert {n: (p.shape, p.dtype) for n, p in merged.items()} == {n: (p.shape, p.dtype) for n, p in params.items()}
    assert not optimizer.switches(0), "a fresh state stands as the first step needs it"
    assert all(isinstance(text, str) for pair in optimizer.metadata.items() for text in pair)


@each_wrapper
def test_to_switch_changes_nothing_that_was_given(wrapper):
    """The step may switch a part of the model, and frees what is left by itself."""
    step = made("adamw", wrapper)
    due = [done for done in range(1, 2 * STEPS) if step.optimizer.switches(done)]
    assert bool(due) == (wrapper != "none")
    if due:
        train(step, 0, due[0])
        state = {key: {slot: t.clone() for slot, t in slots.items()} for key, slots in step.state.items()}
        params = {name: p.detach().clone() for name, p in step.params.items()}
        step.optimizer.switch(dict(step.params), step.state, due[0], 1)
        assert described(step.state) == described(state)
        assert all(t.equal(state[key][slot]) for key, slots in step.state.items() for slot, t in slots.items())
        assert all(p.equal(params[name]) for name, p in step.params.items())
