"""The one place that applies a rule: to a tensor (`move`, `rebuild`), and to named tensors (`update`, `refresh`)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .contract import SEED, Hyper, Optimizer, Params, Rule, Slots, State
from .random import Key, fold
from .rounding import LOW, bits, to_bfloat16

Bound = Literal["none", "tensor", "scale"]


def move(
    rule: Rule,
    g: Tensor,
    slots: Slots,
    p: Tensor,
    hyper: Hyper,
    *,
    clip: Bound = "none",
    bound: Tensor | None = None,
    seed: Tensor | None = None,
    stochastic: bool = True,
) -> tuple[Tensor, Slots, Tensor]:
    """One tensor, moved by its rule: the new p, the new slots, and the 0-d float32 square of g's norm before clipping.

    `clip` says what the 0-d `bound` is: "none" needs none, "tensor" scales g to at most this norm, "scale" multiplies g
    by it. The new p is `add(p, delta, seed)`, or p itself where the rule does not move it; where not `stochastic` it is
    rounded to nearest, and the seed is for the rule's own draws alone. A slot that stays is the old tensor. Nothing is
    written: the caller decides what becomes of the old ones.
    """
    square = g.float().square().sum(-1, keepdim=True).sum()  # by rows: Subset-Norm's own sums, read once
    if clip == "tensor":
        assert bound is not None, "the norm to clip at"
        g = g.float() * (bound / (square.sqrt() + 1e-6)).clamp(max=1)
    elif clip == "scale":
        assert bound is not None, "what to multiply by"
        g = g.float() * bound
    delta, new = rule.update(g, slots, p, hyper if seed is None else {**hyper, SEED: seed})
    return (p if delta is None else add(p, delta, seed if stochastic else None)), new, square


def rebuild(
    rule: Rule, name: str, g: Tensor, slots: Slots, step: int, key: Key, only_missing: bool = False
) -> tuple[Slots, Tensor]:
    """The slots with what depends on this step's gradient rebuilt, and whether it was usable: see `Rule.refresh`. Draws
    are those of (`key`, `name`, `step`)."""
    assert rule.refresh is not None, name
    return rule.refresh(g, slots, fold(key, name, step), only_missing)


def update(
    optimizer: Optimizer, grads: Params, state: State, params: Params, hyper: Mapping[str, Hyper]
) -> tuple[Params, State]:
    """Every parameter that has a gradient, moved by its owner's rule; `hyper` is by group. Nothing is written."""
    params, state = dict(params), dict(state)
    for trained, g in grads.items():
        name = optimizer.parameter_of(trained)
        group = optimizer.owner[name]
        params[name], state[name], _ = move(group.rule, g, state[name], params[name], hyper[group.name])
    return params, state


def refresh(optimizer: Optimizer, grads: Params, state: State, step: int, key: Key) -> tuple[State, list[Tensor]]:
    """Rebuild the bases that are due at `step` among `grads`, and those that are missing still; returns the state and
    one `ok` per tensor that was due."""
    state, flags = dict(state), []
    grads = {optimizer.parameter_of(name): g for name, g in grads.items()}
    due = set(optimizer.due(step, state))
    for name, g in grads.items():
        rule = optimizer.owner[name].rule
        if rule.refresh is None:
            continue
        if name in due:
            state[name], ok = rebuild(rule, name, g, state[name], step, key)
            flags.append(ok)
        elif rule.built is not None and not rule.built(state[name]):
            state[name], _ = rebuild(rule, name, g, state[name], step, key, only_missing=True)
    return state, flags


def add(p: Tensor, delta: Tensor, seed: Tensor | None = None) -> Tensor:
    """`p + delta` in p's dtype, computed in float32 and rounded once: to nearest, or stochastically given a `seed`.

    `seed` is a 0-d int32, of which all bits count. Stochastic rounding (p must be bfloat16) adds 16 random bits below
    the kept ones, so the rounded value is right on average and updates smaller than half an ulp are not lost.
    """
    new = p.float() + delta
    if seed is None or p.dtype != torch.bfloat16:
        return new.to(p.dtype)
    return to_bfloat16(new, bits(seed, p) & LOW)
