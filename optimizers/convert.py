"""From one optimizer's state to another's, a tensor at a time, with a report of what became of it."""

import math
import re
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import PARKED, Hyper, Kind, Optimizer, Params, Rule, Slots, State, bare
from .moments import GUESSED, UNKNOWN, Moments, complete
from .random import Key, fold, normal

PIECE = 2**12  # numbers that are squared at once
RESTED = 100.0  # gradients that a first moment of zero counts for: a rule that corrects for its start does not here


class Row(NamedTuple):
    """What became of one tensor's state. Shares and ratios are NaN where there is nothing to compare."""

    name: str
    source: str
    target: str
    did: str
    first_kept: float  # share of the first moment's energy that the new slots still hold
    second_kept: float  # share of the summed second moment
    jump: float  # RMS of the new rule's next update over the old one's, at equal learning rates


def convert(
    params: Params, state: Mapping[str, Slots], source: Optimizer, target: Optimizer, step: int, key: Key
) -> tuple[State, list[Row]]:
    """`target`'s state after `step` steps, started from what `source`'s knows; nothing is mutated.

    `state` is asked for one tensor's slots at a time, so that it may read them from a disk.

    Weights stay as they are: a view that keeps a part of them apart must have merged it before (`Optimizer.merge`).
    What was frozen has nothing to give: it starts from rest, with the mean second moment of its like in other layers,
    as a rule that knows nothing would begin with its largest steps in the middle of a run. Raises UsageError as
    `target.init` does.
    """
    fresh, rows = target.init(params, step), []
    sizes = _sizes(params, state, source) if any(bare(name) not in state for name in fresh) else {}
    for where, slots in fresh.items():
        name = bare(where)
        new = target.owner[name].rule
        old = source.owner[name].rule if name in source.owner else new  # it was frozen
        held = state[name] if name in state else state.get(PARKED + name, {})
        size = sizes.get(_kind(name))
        fresh[where], row = _one(name, params[name], held, slots, old, new, fold(key, "convert", name), size)
        rows.append(row)
    return fresh, rows


def _kind(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"\d+", "*", name)


def _sizes(params: Params, state: Mapping[str, Slots], source: Optimizer) -> dict[str, float]:
    """The mean second moment by kind of parameter, of what has state."""
    found: dict[str, list[float]] = {}
    for where, slots in state.items():
        name = bare(where)
        export = source.owner[name].rule.export
        second = complete(export(slots, params[name])).second if export and slots else None
        if second is not None:
            found.setdefault(_kind(name), []).append(float(second.mean()))
    return {kind: fmean(means) for kind, means in found.items()}


def _one(
    name: str, p: Tensor, held: Slots, slots: Slots, old: Rule, new: Rule, key: Key, size: float | None
) -> tuple[Slots, Row]:
    """One tensor: its new slots, and the report's row. `size` is the second moment of its like."""
    nan = float("nan")
    if _same(old, new, held, slots):
        return dict(held), Row(name, old.name, new.name, "kept", 1.0, 1.0, 1.0)
    moments = complete(old.export(held, p)) if held and old.export else UNKNOWN
    if moments.first is None or new.adopt is None:
        if new.refresh:  # a basis like any other, until its own turn comes: coordinates would be worse
            slots, _ = new.refresh(new.gradient(normal(key, tuple(p.shape), p.device), slots), slots, key)
        did = "reset: nothing was learned yet" if held else "reset: it was frozen"
        if not held and size and new.adopt is not None:
            rest = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            slots, _ = new.adopt(Moments(rest, torch.full_like(rest, size), (RESTED, GUESSED)), slots, p, key)
            did = "it was frozen: second moment of its like, first moment zero"
        return slots, Row(name, old.name, new.name, did, nan, nan, nan)
    before = _update(old, held, moments.first, p)
    made, did = new.adopt(moments, slots, p, key)
    first, second = _kept(moments, complete(new.export(made, p))) if new.export else (nan, nan)
    now = _update(new, made, moments.first, p)
    return made, Row(name, old.name, new.name, did, first, second, now / before if before else nan)


def _kept(before: Moments, after: Moments) -> tuple[float, float]:
    """Shares of the first moment's energy and of the summed second moment."""
    if after.first is None or after.second is None or before.first is None or before.second is None:
        return float("nan"), float("nan")
    energy = _energy(before.first)
    kept = _energy(after.first) / energy if energy else float("nan")
    return kept, float(after.second.sum() / before.second.sum())


def _energy(x: Tensor) -> float:
    """The sum of squares, in float64 a piece at a time: a copy of the whole would be twice as large."""
    return float(torch.stack([part.double().square().sum() for part in torch.split(x.flatten(), PIECE)]).sum())


def _update(rule: Rule, slots: Slots, g: Tensor, p: Tensor) -> float:
    """RMS of the update that a gradient equal to the first moment brings, at learning rate 1 and without decay."""
    hyper: Hyper = {key: torch.tensor(value, device=p.device) for key, value in (("lr", 1.0), ("weight_decay", 0.0))}
    delta, new = rule.update(rule.gradient(g, slots), slots, p, hyper)
    if delta is None:
        assert rule.product is not None, rule.name
        delta = rule.product(new) - rule.product(slots)
    return math.sqrt(_energy(delta) / delta.numel())


def _same(old: Rule, new: Rule, held: Slots, slots: Slots) -> bool:
    """May the slots stay as they are: the same rule with the same options, under wrappers that give the same, and no
    weights among them, as those were merged?"""
    if (old.name, old.options, old.slots) != (new.name, new.options, new.slots) or new.names(Kind.WEIGHT):
        return False
    return _like(held, slots) and all(
        torch.equal(held[slot.name], slots[slot.name]) for slot in new.slots if slot.given
    )


def _like(a: Slots, b: Slots) -> bool:
    """Same slots, shapes and dtypes."""
    return {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
