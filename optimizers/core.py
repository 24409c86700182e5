"""The contract of every optimizer here: pure functions over flat dicts of named tensors.

A *rule* moves one tensor and knows nothing else: no names, no tree, no clock, no device. An *optimizer* moves a
whole model: it says who owns which parameter, what is trainable now (`view`) and what changes between steps
(`turn`). Nothing here mutates its inputs; the engine decides where results are written.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .moments import Moments
from .random import Key, fold

Params = dict[str, Tensor]
Slots = dict[str, Tensor]
State = dict[str, Slots]
Hyper = Mapping[str, Tensor]  # "lr" and "weight_decay", 0-d float32: a Python float that changes would recompile


class UsageError(ValueError):
    """What was asked for cannot be done. The message says: name, got, expected, what to do."""


class Refresh(Protocol):
    """A rule's refresh."""

    def __call__(self, g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]: ...


class Rule(NamedTuple):
    """How one tensor moves.

    `init(p) -> slots` allocates state and draws nothing. `update(g, slots, p, hyper) -> (delta, slots)` is hot and
    is compiled; the new value is `p + delta`, or p itself where delta is None. `refresh(g, slots, key) -> (slots, ok)`
    is cold and eager: every `gap` steps it rebuilds what depends on this step's gradient (a subspace basis) before
    `update` sees it; `ok` is a 0-d bool that is False where the gradient was unusable and old slots were kept. That is
    at step 0 and where step mod gap = `offset`. Given `only_missing` it rebuilds what was never built, as no gradient
    was usable yet, and leaves the rest bitwise as it is: so it may be called at any step until there is a basis, and
    nobody has to know on the host whether there is one; `built(slots)`, a 0-d bool, says so. `export(slots, p)` and
    `adopt(moments, slots, p, key)`, cold too, carry what was learned to another rule: see `moments`. `adopt` gets fresh
    slots and both moments, and returns slots and what it did to them.
    """

    name: str
    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Slots, Tensor, Hyper], tuple[Tensor | None, Slots]]
    refresh: Refresh | None = None
    gap: int = 0
    offset: int = 0
    export: Callable[[Slots, Tensor], Moments] | None = None
    adopt: Callable[[Moments, Slots, Tensor, Key], tuple[Slots, str]] | None = None
    built: Callable[[Slots], Tensor] | None = None


class Group(NamedTuple):
    """Parameters that share a rule and its scheduled numbers. `match` holds regular expressions, searched in names."""

    name: str
    rule: Rule
    match: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    why: str = ""


class Optimizer(NamedTuple):
    """How a model moves. `owner` maps every parameter to its group.

    `init(params, step)` is the state as it stands once `step` steps are done, values aside: at 0, a fresh one.
    `view(params, state) -> (trainable, frozen)` is the model as its segments see it now. A trainable name is a
    parameter, or something in the state that stands for one: its gradient moves the parameter `moves[name]`.
    `due(step)` names the parameters whose rule refreshes at this step.
    `turn(params, state, step, key) -> (params, state)` is cold: what changes between steps (a mask, a subspace),
    before those steps for which `turns` holds. It takes any part of the model, so that the engine can turn one segment
    after another and never holds a second copy of the weights. `batch(step)` is the batch that a step trains on, where
    order is part of the method. `merge(params, state)` are the weights that a model has without its optimizer. `about`
    goes into the head of every checkpoint's state.
    """

    owner: Mapping[str, Group]
    init: Callable[..., State]
    update: Callable[[Params, State, Params, Mapping[str, Hyper]], tuple[Params, State]]
    due: Callable[[int], tuple[str, ...]]
    view: Callable[[Params, State], tuple[Params, Params]] = lambda params, state: (params, {})
    turns: Callable[[int], bool] = lambda step: False
    turn: Callable[[Params, State, int, Key], tuple[Params, State]] = lambda params, state, step, key: (params, state)
    moves: Mapping[str, str] = MappingProxyType({})
    batch: Callable[[int], int] = lambda step: step
    about: Mapping[str, str] = MappingProxyType({})
    merge: Callable[[Params, State], Params] = lambda params, state: params


PARKED = "parked:"  # before a parameter's name in the state: slots of a frozen tensor, kept for its return


def part(state: State, names: Iterable[str]) -> State:
    """The state of these parameters, parked slots among it."""
    own = set(names)
    return {key: slots for key, slots in state.items() if key.removeprefix(PARKED) in own}


def route(names: Sequence[str], groups: Sequence[Group]) -> dict[str, Group]:
    """Give every name to the first group with a matching pattern.

    Raises UsageError where a pattern matches nothing, a group ends up with nothing, or a name has no owner.
    """
    owner: dict[str, Group] = {}
    for name in names:
        for group in groups:
            if any(re.search(pattern, name) for pattern in group.match):
                owner[name] = group
                break
        else:
            raise UsageError(
                f"parameter {name!r} is owned by no rule; add a pattern that matches it to one of "
                f"{[g.name for g in groups]}"
            )
    for group in groups:
        for pattern in group.match:
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(
                    f"pattern {pattern!r} of {group.name!r} matches no parameter; the names look like {list(names)[:3]}"
                )
        if group not in owner.values():
            raise UsageError(
                f"group {group.name!r} owns nothing: earlier groups already own all that {list(group.match)} match"
            )
    return owner


def stagger(sizes: Mapping[str, int], gap: int) -> dict[str, int]:
    """Offsets in [0, gap) that spread refreshes over steps so that each step does about the same work.

    `sizes` is the cost of each refresh (elements). Tensors are laid end to end, by name, on a circle of `gap` steps, so
    that the order of `sizes` does not matter.
    """
    total, seen, offsets = sum(sizes.values()), 0, {}
    for name in sorted(sizes):
        offsets[name] = seen * gap // total
        seen += sizes[name]
    return {name: offsets[name] for name in sizes}


def partition(params: Params, groups: Sequence[Group], staggered: bool = True) -> Optimizer:
    """An optimizer that gives every parameter to one group and trains all of them all the time.

    With `staggered`, bases are rebuilt a few tensors a step (all of them on step 0) instead of all on the same step.
    Raises UsageError as `route` does, and where a rule cannot serve a tensor it is given.
    """
    owner = route(list(params), groups)
    gapped = {n: params[n].numel() for n, g in owner.items() if g.rule.gap}
    offsets = {n: owner[n].rule.offset for n in gapped}
    if staggered:
        for gap in {owner[n].rule.gap: None for n in gapped}:
            spread = stagger({n: s for n, s in gapped.items() if owner[n].rule.gap == gap}, gap)
            offsets |= {n: (offset + offsets[n]) % gap for n, offset in spread.items()}

    def due(step: int) -> tuple[str, ...]:
        return tuple(n for n, offset in offsets.items() if step == 0 or step % owner[n].rule.gap == offset)

    return Optimizer(owner, lambda params, step=0: blank(owner, params), updating(owner), due)


def blank(owner: Mapping[str, Group], params: Params) -> State:
    """A fresh state for these parameters. Raises UsageError, with its name, where a rule cannot serve one."""
    state = {}
    for name, p in params.items():
        try:
            state[name] = owner[name].rule.init(p)
        except UsageError as error:
            raise UsageError(f"{name} {tuple(p.shape)}: {error}") from None
    return state


def updating(
    owner: Mapping[str, Group], moves: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Params, State, Params, Mapping[str, Hyper]], tuple[Params, State]]:
    """An optimizer's `update`: (gradients, state, params, hyper by group) -> (params, state), by each owner's rule."""

    def update(grads: Params, state: State, params: Params, hyper: Mapping[str, Hyper]) -> tuple[Params, State]:
        new_params, new_state = dict(params), dict(state)
        for trained, g in grads.items():
            name = moves.get(trained, trained)
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
    grads = {optimizer.moves.get(name, name): g for name, g in grads.items()}
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


def clock(p: Tensor) -> Slots:
    """Slots that count: `step` (0-d float32) and `bias_correction` = (1 - beta1^step, 1 - beta2^step), float64.

    The pair is one tensor because torch 2.13 loses, without a word, what a compiled function writes into a 0-d
    float64 tensor on the CPU.
    """
    return {"step": p.new_zeros((), dtype=torch.float32), "bias_correction": p.new_zeros(2, dtype=torch.float64)}


def tick(slots: Slots, betas: tuple[float, float]) -> tuple[Slots, Tensor, Tensor]:
    """One active step: (the slots of `clock`, 1 - beta1^t, 1 - beta2^t), the two as 0-d float32.

    The corrections are carried by c <- beta c + (1 - beta) because a power of the step inside a fused update is
    evaluated again for every vector of the tensor (1.6 times the time of a whole AdamW update).
    """
    c1, c2 = (c * beta + (1 - beta) for c, beta in zip(slots["bias_correction"], betas, strict=True))
    return {"step": slots["step"] + 1, "bias_correction": torch.stack([c1, c2])}, c1.float(), c2.float()


def state_bytes(slots: Slots) -> int:
    """Bytes of one tensor's slots, scalars included."""
    return sum(t.numel() * t.element_size() for t in slots.values())


def total_bytes(state: State) -> int:
    """Bytes of a whole state; a tensor that several parameters share counts once."""
    return state_bytes({str(id(t)): t for slots in state.values() for t in slots.values()})
