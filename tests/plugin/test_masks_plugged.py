"""OMGD and LISA in somebody's own loop: the engine's numbers, and nothing is held for a layer that is frozen."""

import copy

import pytest
import torch
from helpers.grids import covering
from helpers.plugged import STEPS, engine, engine_step, facade, facade_step, same, same_state, toy, weights
from torch import nn

from optimizers import torch_optim
from optimizers.contract import UsageError
from optimizers.registry import RULES
from optimizers.wrappers.masks import Masks
from optimizers.wrappers.norms import norm_masks
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

OMGD, LISA = Masks(active=1, period=4), Masks(active=1, period=3, replacement=True, scale_mode="none")
MASKS = {"omgd": OMGD, "lisa": LISA}
RISING = Masks(active=1, period=4, turn_warmup=6)
BREAK = 7


def frozen(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.run
@pytest.mark.parametrize(("name", "masks"), [*covering(RULES, MASKS), ("adamw", "rising")])
def test_twelve_steps_with_a_resume_are_those_of_the_engine(name, masks):
    wrap = RISING if masks == "rising" else MASKS[masks]
    theirs, mine = toy(), toy()
    step, opt = engine(theirs, name, wrap), facade(mine, name, wrap=wrap)
    seen = set()
    for i in range(STEPS):
        if i == BREAK:
            saved, trained = copy.deepcopy(opt.state_dict()), mine.state_dict()
            mine = toy()
            mine.load_state_dict(trained)
            opt = facade(mine, name, wrap=wrap)
            opt.load_state_dict(saved)
        now = frozen(mine)
        seen.add(frozenset(now))
        held = {n for n, p in mine.named_parameters() if p in opt.state}
        assert not now & held and now | held == set(dict(mine.named_parameters()))
        engine_step(step, theirs, i)
        switching = opt._made.optimizers[0].switches(i + 1)
        facade_step(opt, mine, i)
        assert same(weights(mine), weights(theirs)), i
        if not switching:
            assert same_state(opt.named_state(), step.state), i
        else:
            assert all(p.grad is None for p in mine.parameters() if not p.requires_grad)
    assert len(seen) == 2, "both layers had their turn"


def test_autograd_saves_nothing_for_a_frozen_layer():
    model = toy()
    facade(model, "adamw", wrap=OMGD)
    (index,) = {name.split(".")[1] for name in frozen(model)}
    still, moving = model.layers[int(index)].up_proj, model.layers[1 - int(index)].up_proj

    def saved(linear: nn.Linear) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
            linear(torch.randn(3, 6, requires_grad=True))
        return sum(1 for shape in kept if shape == (3, 6))

    assert (saved(still), saved(moving)) == (0, 1)


def test_what_a_loop_cannot_follow_is_refused():
    model = toy()
    opt = facade(model, "adamw", wrap=OMGD)
    with pytest.raises(UsageError, match="wrapped takes no more"):
        opt.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2)))]})
    assert "more" not in opt.owners()
    facade_step(opt, model, 0)
    model.requires_grad_(True)
    with pytest.raises(UsageError, match="is frozen now, and asks for a gradient"):
        facade_step(opt, model, 1)
    with pytest.raises(UsageError, match="saved under"):
        facade(toy(), "adamw").load_state_dict(opt.state_dict())
    with pytest.raises(UsageError, match="saved under"):
        facade(toy(), "adamw", wrap=OMGD, seed=1).load_state_dict(opt.state_dict())

    def kept(base, params, key):
        return omgd(base, params, traversal(layers(params), key, active=1, period=2), "grad", "keep")

    def joint(base, params, key):
        return omgd(base, params, traversal(layers(params), key, active=1, period=2, order="joint"), "grad", "keep")

    def subspace(base, params, key):
        return rso(base, params, ["layers.0.q_proj.weight"], 2, 4, key, form="products")

    def by_norm(base, params, key):
        return omgd(base, params, norm_masks(layers(params), key, active=1, period=2), "none")

    for wrap, match in (
        (by_norm, "depend on the gradient norms"),
        (kept, "state_policy 'drop'"),
        (joint, "drop"),
        (subspace, "form 'merged'"),
    ):
        with pytest.raises(UsageError, match=match):
            facade(toy(), "adamw", wrap=wrap)


def test_a_copy_goes_on_under_its_masks():
    model = toy()
    opt = torch_optim.SUMO(model, lr=0.05, rank=2, update_proj_gap=3, wrap=OMGD)
    for i in range(3):
        facade_step(opt, model, i)
    twin, other = copy.deepcopy((model, opt))
    for i in range(3, 9):
        facade_step(opt, model, i)
        facade_step(other, twin, i)
    assert same(weights(model), weights(twin)) and frozen(model) == frozen(twin)
