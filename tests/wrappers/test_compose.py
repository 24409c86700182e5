"""Wrappers over wrappers: each combination trains, resumes bitwise, and its state is the product of both savings."""

import re
from collections.abc import Callable

import pytest
import torch
from helpers.grids import few
from helpers.models import copied
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from models.llama import Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Params, State, total_bytes
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd
from optimizers.state import parked_by
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, tensors, traversal

SHAPE = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=16,
)
MATRICES = r"layers\.\d+\..*_proj\.weight$"
PERIOD, STEPS = 3, 10


def plain(params: Params, rule=None) -> Optimizer:
    rule = rule or adamw()
    return partition(params, [Group("main", rule, (MATRICES,), 0.01), Group("rest", adamw(), ("",), 0.01)])


def masked(
    base: Optimizer, params: Params, policy: str = "drop", seed: int = 1, active: int = 2, period: int = 2, **options
) -> Optimizer:
    masks = traversal(layers(params), Key(seed), active=active, period=period, **options)
    return omgd(base, params, masks, state_policy=policy)


def low(base: Optimizer, params: Params, form: str = "merged", **options) -> Optimizer:
    names = [n for n in params if re.search(MATRICES, n)]
    return rso(base, params, names, 4, PERIOD, Key(7), form, **options)


def narrow(base: Optimizer, params: Params, policy: str = "drop") -> Optimizer:
    masks = traversal(tensors(params, (MATRICES,)), Key(3), keep=0.5, period=3)
    return omgd(base, params, masks, state_policy=policy)


def twice(inner: str, outer: str, base: Optimizer, params: Params, **options) -> Optimizer:
    """Masks over masks: of 3 layers that one lets train for 3 steps, another lets those train that are among its 2."""
    return masked(masked(base, params, inner, active=3, period=3), params, outer, seed=2, **options)


COMPOSED: dict[str, tuple[Callable[[Params], Optimizer], str]] = {
    "omgd over rso": (lambda p: masked(low(plain(p), p), p), "merged"),
    "omgd over rso, products": (lambda p: masked(low(plain(p), p, "products"), p), "products"),
    "omgd over rso, products, keep": (lambda p: masked(low(plain(p), p, "products"), p, "keep"), "products"),
    "omgd over rso, warm-up, keep": (lambda p: masked(low(plain(p), p, warmup=2, moments="keep"), p, "keep"), "merged"),
    "omgd over rso over galore": (lambda p: masked(low(plain(p, galore(2, 4)), p), p), "merged"),
    "rso over omgd": (lambda p: low(masked(plain(p), p), p), "merged"),
    "rso over omgd, products": (lambda p: low(masked(plain(p), p), p, "products"), "products"),
    "rso over omgd, products, keep": (lambda p: low(masked(plain(p), p, "keep"), p, "products"), "products"),
    "rso over omgd over galore": (lambda p: low(masked(plain(p, galore(2, 4)), p), p), "merged"),
    "omgd over omgd": (lambda p: masked(masked(plain(p), p, active=3), p, seed=2), ""),
    "omgd over masks of tensors": (lambda p: masked(narrow(plain(p), p), p), ""),
    "omgd over omgd over rso": (lambda p: masked(masked(low(plain(p), p), p, active=3), p, seed=2), "merged"),
    "omgd keep over omgd keep": (lambda p: twice("keep", "keep", plain(p), p), ""),
    "omgd keep over omgd drop": (lambda p: twice("drop", "keep", plain(p), p), ""),
    "omgd drop over omgd keep": (lambda p: twice("keep", "drop", plain(p), p), ""),
    "omgd offload over omgd keep": (lambda p: twice("keep", "offload", plain(p), p), ""),
    "lisa keep over omgd keep": (lambda p: twice("keep", "keep", plain(p), p, replacement=True), ""),
    "omgd keep over omgd keep over galore": (lambda p: twice("keep", "keep", plain(p, galore(2, 4)), p), ""),
    "omgd keep over omgd keep over rso, products": (
        lambda p: twice("keep", "keep", low(plain(p), p, "products"), p),
        "products",
    ),
    "omgd keep over omgd drop over rso": (lambda p: twice("drop", "keep", low(plain(p), p), p), "merged"),
    "omgd keep over rso over omgd keep": (
        lambda p: masked(low(masked(plain(p), p, "keep", active=3, period=3), p, "products"), p, "keep", seed=2),
        "products",
    ),
    "rso over omgd keep over omgd keep": (lambda p: low(twice("keep", "keep", plain(p), p), p), "merged"),
    "omgd keep over masks of tensors, keep": (lambda p: masked(narrow(plain(p), p, "keep"), p, "keep"), ""),
    "omgd keep over omgd keep over omgd keep": (
        lambda p: masked(twice("keep", "keep", plain(p), p), p, "keep", seed=4, active=3, period=1),
        "",
    ),
    "omgd, joint order, over omgd keep": (
        lambda p: masked(masked(plain(p), p, "keep", active=3, period=3), p, "keep", seed=2, order="joint"),
        "",
    ),
    "omgd over rso over sgd without state": (lambda p: masked(low(plain(p, sgd(0.0)), p), p), "merged"),
}
FAST = (  # every wrapper and policy, inside and outside, three deep
    "omgd over rso, products, keep",
    "omgd over rso, warm-up, keep",
    "rso over omgd over galore",
    "omgd over masks of tensors",
    "omgd keep over omgd drop",
    "omgd offload over omgd keep",
    "lisa keep over omgd keep",
    "omgd keep over rso over omgd keep",
    "rso over omgd keep over omgd keep",
    "omgd, joint order, over omgd keep",
    "omgd over rso over sgd without state",
)
each = pytest.mark.parametrize("name", few(COMPOSED, *FAST))


def engine(name: str, weights: Params | None = None, state: State | None = None) -> Step:
    model = Llama(SHAPE, seed=0)
    params = dict(model.named_parameters())
    if weights:
        for n, p in weights.items():
            params[n].data.copy_(p)
    make, form = COMPOSED[name]
    optimizer = make(params)
    if form:
        attach(model, [n for n in params if re.search(MATRICES, n)], 4, form)
    return Step(cut(model), params, optimizer, state or optimizer.init(params), mode="off", key=Key(5))


def batch(t: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(t))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}


def train(step: Step, steps: range) -> list[float]:
    hyper = {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.0)}
    losses = []
    for t in steps:
        step.switch(t)
        losses.append(float(step([batch(t % 2)], {g.name: hyper for g in step.optimizer.owner.values()}, t).loss))
    return losses


def shapes(state: State) -> dict:
    return {n: (parked_by(slots), {s: (t.shape, t.dtype) for s, t in slots.items()}) for n, slots in state.items()}


@pytest.mark.run
@each
def test_a_composition_learns_and_resumes_bitwise_anywhere(name):
    """From what each step leaves a fresh optimizer makes the same next step: a run resumed anywhere ends the same."""
    whole, losses = engine(name), []
    for step in range(STEPS):
        weights = {n: p.detach().clone() for n, p in whole.params.items()}
        state = copied(whole.state)
        expected = whole.optimizer.init(whole.params, step)
        assert shapes(expected) == shapes(state), "what a resumed run expects to find"
        assert list(expected) == list(state)
        losses += train(whole, range(step, step + 1))
        resumed = engine(name, weights, state)
        train(resumed, range(step, step + 1))
        for n, p in whole.params.items():
            assert torch.equal(p, resumed.params[n]), (n, step)
        assert shapes(whole.state) == shapes(resumed.state)
        for key, slots in whole.state.items():
            assert all(torch.equal(t, resumed.state[key][slot]) for slot, t in slots.items()), (key, step)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "name", ["omgd over rso, products", "rso over omgd, products", "rso over omgd, products, keep"]
)
def test_a_layer_that_leaves_takes_its_product_along(name):
    """The function that the model computes is the same before and after a mask or a subspace changes."""
    step = engine(name)
    hyper = {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.0)}
    for t in range(STEPS):
        losses = []
        for change in (lambda: None, lambda t=t: step.switch(t)):
            change()
            losses.append(float(step.chain.loss(step.tensors(), batch(0))[0]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), t
        step([batch(t % 2)], {g.name: hyper for g in step.optimizer.owner.values()}, t)


def test_state_is_the_product_of_both_savings():
    params = dict(Llama(SHAPE, seed=0).named_parameters())
    under = {n: p for n, p in params.items() if re.search(MATRICES, n)}

    def held(made: Optimizer) -> int:
        state = made.init(params)
        return total_bytes(
            {n: {s: t for s, t in state[n].items() if s.startswith("exp_avg")} for n in under if n in state}
        )

    alone, mask, subspace = held(plain(params)), held(masked(plain(params), params)), held(low(plain(params), params))
    for made in (masked(low(plain(params), params), params), low(masked(plain(params), params), params)):
        assert held(made) / alone == pytest.approx((mask / alone) * (subspace / alone), rel=1e-6)


def test_what_one_of_two_masks_freezes_is_parked_by_that_one():
    """And what neither freezes trains; what was kept returns with the moments that it left with."""
    step = engine("omgd offload over omgd keep")
    outer, inner = step.optimizer.masks, step.optimizer.base.masks
    seen, left = set(), {}
    for t in range(STEPS):
        step.switch(t)
        for i in range(SHAPE.num_hidden_layers):
            name = f"model.layers.{i}.mlp.up_proj.weight"
            slots = step.state[name]
            by = dict(parked_by(slots))
            if i in outer.active(t):
                assert by == ({} if i in inner.active(t) else {1: False}), (t, i)
            else:  # what the inner mask made of it meanwhile, it makes up for at its return
                assert by[2] is True, (t, i)
            seen.add(tuple(by))
            if name in left:
                assert torch.equal(left[name], slots["exp_avg"]), (t, i)
        train(step, range(t, t + 1))
        left = {n: s["exp_avg"].clone() for n, s in step.state.items() if "up_proj" in n}
    assert seen == {(), (1,), (2,), (1, 2)}
