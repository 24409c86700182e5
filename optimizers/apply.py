"""What applies rules to tensors, and rounds."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .contract import Group, Hyper, Optimizer, Params, State
from .random import Key, fold


def updating(
    owner: Mapping[str, Group], parameter_of: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Params, State, Params, Mapping[str, Hyper]], tuple[Params, State]]:
    """An optimizer's `update`: (gradients, state, params, hyper by group) -> (params, state), by each owner's rule."""

    def update(grads: Params, state: State, params: Params, hyper: Mapping[str, Hyper]) -> tuple[Params, State]:
        new_params, new_state = dict(params), dict(state)
        for trained, g in grads.items():
            name = parameter_of.get(trained, trained)
            group = owner[name]
            delta, new_state[name] = group.rule.update(g, state[name], params[name], hyper[group.name])
            if delta is not None:
                new_params[name] = add(params[name], delta)
        return new_params, new_state

    return update


def refresh(optimizer: Optimizer, grads: Params, state: State, step: int, key: Key) -> tuple[State, list[Tensor]]:
    """Rebuild the bases that are due at `step` among `grads`, and those that are missing still; returns the state and
    one `ok` per tensor that was due."""
    state, flags = dict(state), []
    grads = {optimizer.parameter_of.get(name, name): g for name, g in grads.items()}
    due = set(optimizer.due(step))
    for name, g in grads.items():
        rule = optimizer.owner[name].rule
        if rule.refresh is None:
            continue
        if name in due:
            state[name], ok = rule.refresh(g, state[name], fold(key, name, step))
            flags.append(ok)
        elif rule.built is not None and not rule.built(state[name]):
            state[name], _ = rule.refresh(g, state[name], fold(key, name, step), only_missing=True)
    return state, flags


def add(p: Tensor, delta: Tensor, seed: Tensor | None = None) -> Tensor:
    """`p + delta` in p's dtype, computed in float32 and rounded once: to nearest, or stochastically given a `seed`.

    `seed` is a 0-d int32, of which all bits count. Stochastic rounding (p must be bfloat16) adds 16 random bits below
    the kept ones, so the rounded value is right on average and updates smaller than half an ulp are not lost. The bits
    are a hash of (seed, position), so nothing but the seed has to be saved, and the same graph gives the same bits
    anywhere.
    """
    new = p.float() + delta
    if seed is None or p.dtype != torch.bfloat16:
        return new.to(p.dtype)
    position = torch.arange(p.numel(), dtype=torch.int32, device=p.device).view(p.shape)
    bits = (position * -1640531527) ^ seed  # 2^32 / golden ratio, as Knuth's multiplicative hash
    for shift, factor in ((16, 2146121005), (15, -2073254261), (16, 1)):  # the "lowbias32" finalizer
        bits = (bits ^ ((bits >> shift) & (0xFFFFFFFF >> shift))) * factor
    rounded = ((new.view(torch.int32) + (bits & 0xFFFF)) & -65536).view(torch.float32)
    return torch.where(new.isfinite(), rounded, new).to(p.dtype)
