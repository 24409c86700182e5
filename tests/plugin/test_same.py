"""A rule in somebody's own loop moves as it does in the engine: to the bit for the same gradients."""

import io

import pytest
import torch
from helpers.grids import covering, few
from helpers.plugged import (
    STEPS,
    engine,
    engine_step,
    facade,
    facade_step,
    options,
    same,
    same_state,
    toy,
    weights,
)

from optimizers.registry import RULES
from optimizers.torch_optim import optimizer

BREAKS = (4, 8)  # before these the run is saved and goes on in another optimizer; at the first, a basis is missing


def through_a_file(state):
    """As torch.save and torch.load(weights_only=True) carry it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.run
@pytest.mark.parametrize(("name", "dtype"), covering(RULES, [torch.float32, torch.bfloat16]))
def test_twelve_steps_with_two_resumes_are_those_of_the_engine(name, dtype):
    rounding = {"stochastic_rounding": dtype == torch.bfloat16}
    theirs, mine = toy().to(dtype), toy().to(dtype)
    step, opt = engine(theirs, name, **rounding), facade(mine, name, **rounding)
    for i in range(STEPS):
        if i in BREAKS:
            saved = through_a_file(opt.state_dict())
            resumed = toy().to(dtype)
            resumed.load_state_dict(mine.state_dict())
            mine, opt = resumed, facade(resumed, name)
            opt.load_state_dict(saved)
        engine_step(step, theirs, i)
        facade_step(opt, mine, i)
        assert same(weights(mine), weights(theirs)), i
        assert same_state(opt.named_state(), step.state), i
    assert not same(weights(mine), weights(toy().to(dtype)))


@pytest.mark.compiles
@pytest.mark.parametrize("name", few(["sumo", "adamw"], "sumo"))
def test_compiled_it_is_the_same_kernel_and_a_schedule_compiles_nothing_anew(name, backend):
    theirs, mine = toy(), toy()
    plain, fast = facade(theirs, name), facade(mine, name, compile=True)
    graphs = []
    for i in range(6):
        facade_step(plain, theirs, i)
        facade_step(fast, mine, i)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] > 0 and graphs[1] == graphs[-1]
    for (n, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=n)


def test_a_rule_is_there_because_it_is_in_the_registry(monkeypatch):
    family = type(RULES["sgd"])("my_own", RULES["sgd"].options, RULES["sgd"]._build, momentum=0.5)
    with pytest.raises(ValueError, match="my_own"):
        optimizer("my_own")
    monkeypatch.setitem(RULES, "my_own", family)
    from optimizers import torch_optim

    assert torch_optim.MyOwn is optimizer("my_own")
    model = toy()
    opt = torch_optim.MyOwn(model, lr=0.1)
    assert opt.param_groups[0]["options"]["momentum"] == 0.5
    facade_step(opt, model, 0)


@pytest.mark.parametrize("name", RULES)
def test_a_class_has_a_name_and_its_options_in_its_help(name):
    kind = optimizer(name)
    assert kind.__name__.lower() == name.replace("_", "") and issubclass(kind, torch.optim.Optimizer)
    assert all(option in kind.__doc__ for option in options(name))
