"""A frozen parameter has no gradient, no state, and does not move."""

import pytest
import torch
from helpers.grids import covering
from helpers.modules import LR, llama
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from models.llama import Llama
from optimizers.contract import Group, UsageError
from optimizers.partition import freeze, partition, trainable
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

RULES = {"adamw": adamw(), "sgd": sgd(0.9), "muon": muon(), "galore": galore(4, 2), "snsm": snsm(4, 2)}
RULES |= {"sumo": sumo(4, 2)}
PROJ = r"_proj\.weight$"


def optimizer_of(name: str, model: Llama, params: dict[str, Tensor]):
    rule, _, wrapper = name.partition(" ")
    base = partition(params, [Group("rule", RULES[rule], (PROJ,), LR, 0.1), Group("rest", adamw(), ("",), LR, 0.1)])
    if wrapper == "omgd":
        return omgd(base, params, traversal(layers(params), Key(1), active=1, period=2))
    if wrapper == "lisa":
        return omgd(base, params, traversal(layers(params), Key(1), active=1, period=2, replacement=True), "none")
    if wrapper:
        from models.layers import attach

        names = [n for n in trainable(params) if n.endswith("_proj.weight")]
        attach(model, names, 4, wrapper)
        return rso(base, params, names, 4, period=2, form=wrapper)
    return base


@pytest.mark.parametrize(
    ("method", "recompute"),
    covering([*RULES, "adamw omgd", "adamw lisa", "adamw merged", "adamw products"], [False, True]),
)
def test_a_frozen_parameter_has_no_gradient_no_state_and_does_not_move(method, recompute):
    model = llama()
    params = dict(model.named_parameters())
    freeze(params, (r"layers\.0\.mlp", "embed", r"norm\.weight$"))
    frozen = [n for n, p in params.items() if not p.requires_grad]
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = optimizer_of(method, model, params)
    state = optimizer.init(params)
    step = Step(cut(model), params, optimizer, state, mode="off", recompute=recompute)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    for i in range(5):
        step.switch(i)
        result = step([batch], step=i)
        assert not {n for names, _ in result.squares for n in names} & set(frozen)
    assert len(frozen) == 9 and not step.state.keys() & set(frozen)
    assert all(params[n].equal(before[n]) and not params[n].requires_grad for n in frozen)
    moved = [n for n in params if n not in frozen and not params[n].equal(before[n])]
    assert moved and all(params[n].requires_grad for n in moved), "flags stay the module's own"
    if method == "adamw":
        assert len(moved) == len(params) - len(frozen)


def test_what_cannot_be_frozen_is_named():
    model = llama()
    params = dict(model.named_parameters())
    with pytest.raises(UsageError, match="pattern 'nothing' matches no parameter; the names look like"):
        freeze(params, ("nothing",))
    with pytest.raises(UsageError, match=r"'\(' is no regular expression"):
        freeze(params, ("(",))
    with pytest.raises(UsageError, match="there is nothing to train"):
        freeze(params, ("",))
    with pytest.raises(UsageError, match="every parameter is frozen"):
        partition(params, [Group("all", adamw(), ("",), LR)])
    model = llama()
    params = dict(model.named_parameters())
    part = {n: p for n, p in params.items() if "embed" not in n}
    optimizer = partition(part, [Group("all", adamw(), ("",), LR)])
    with pytest.raises(UsageError, match=r"'model.embed_tokens.weight' requires a gradient, and is owned by no group"):
        Step(cut(model), params, optimizer, optimizer.init(params), mode="off")
