"""From one optimizer's state to another's, a tensor at a time, with a report of what became of it."""

import math
import re
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Hyper, Kind, Optimizer, Params, Rule, Slots, State
from .moments import GUESSED, UNKNOWN, Moments, complete
from .random import Key, fold, normal
from .state import parked_by, place, with_status
from .storage.last_bits import LAST_BITS
from .storage.slots import decoded, encoded
from .storage.stored import plainly

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
    """`target`'s state after `step` steps, started from what `source`'s knows; nothing is mutated, and what is returned
    shares no memory with `state`.

    `state` is asked for one tensor's slots at a time, so that it may read them from a disk. New slots are made a tensor
    at a time too, the largest tensors first.

    Weights stay as they are: an optimizer that keeps a part of them apart must have merged it before
    (`Optimizer.merge`).
    What was frozen has nothing to give: it starts from rest, with the mean second moment of its like in other layers,
    as a rule that knows nothing would begin with its largest steps in the middle of a run. Raises UsageError as
    `target.init` does.
    """
    whole = target.init({name: torch.empty_like(p, device="meta") for name, p in params.items()}, step)
    sizes = _sizes(params, state, source) if any(name not in state for name in whole if name in params) else {}
    made, rows = State(), dict[str, Row]()
    for names in _together(whole, params):
        fresh = target.init({name: params[name] for name in names}, step)
        made |= {key: fresh.pop(key) for key in target.shared}  # of what was never seen, nothing can be taken over
        for name in list(fresh):
            by, device = parked_by(fresh[name]), params[name].device
            fresh[name] = place(with_status({}, fresh[name]), device)  # from the host, if it is parked there
            new = target.owner[name].rule
            old = source.owner[name].rule if name in source.owner else new  # it was frozen
            size = sizes.get(_kind(name))
            slots, rows[name] = _one(name, params[name], state, fresh, old, new, fold(key, "convert", name), size)
            made[name] = place(with_status(by, slots), device)
            del slots
    return {name: made[name] for name in whole}, [rows[name] for name in whole if name in rows]


def _together(whole: State, params: Params) -> list[list[str]]:
    """The parameters that have state, those that share one of its tensors together, the largest first: what converting
    one takes beside its new slots is then needed while those of smaller ones are not there yet."""
    groups: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, slots in ((name, slots) for name, slots in whole.items() if name in params):
        groups[name] = [name]
        for t in slots.values():
            own, other = groups[name], groups[first.setdefault(id(t), name)]
            if own is not other:
                other += own
                groups |= dict.fromkeys(own, other)
    distinct = list({id(names): names for names in groups.values()}.values())
    return sorted(distinct, key=lambda names: -max(params[name].numel() for name in names))


def _kind(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"\d+", "*", name)


def _sizes(params: Params, state: Mapping[str, Slots], source: Optimizer) -> dict[str, float]:
    """The mean second moment by kind of parameter, of what has state."""
    found: dict[str, list[float]] = {}
    for name in (name for name in state if name in source.owner):
        slots, export = state[name], source.owner[name].rule.export
        second = complete(export(slots, params[name])).second if export and slots else None
        if second is not None:
            found.setdefault(_kind(name), []).append(float(second.mean()))
    return {kind: fmean(means) for kind, means in found.items()}


def _one(
    name: str,
    p: Tensor,
    state: Mapping[str, Slots],
    fresh: State,
    old: Rule,
    new: Rule,
    key: Key,
    size: float | None,
) -> tuple[Slots, Row]:
    """One tensor: its new slots, made from `fresh[name]`, which is taken out, and the report's row. `size` is the
    second moment of its like. Old slots and moments are let go as soon as they were used."""
    held, slots = state.get(name, {}), fresh.pop(name)
    nan = float("nan")
    if LAST_BITS in held and LAST_BITS in slots:
        slots[LAST_BITS].copy_(held[LAST_BITS])  # they belong to the weight, whatever moves it
    if _same(old, new, held, slots):
        for slot, t in slots.items():
            t.copy_(held[slot])  # whoever gave it keeps it, and slots that tensors share stay one
        return slots, Row(name, old.name, new.name, "kept", 1.0, 1.0, 1.0)
    moments = complete(old.export(held, p)) if held and old.export else UNKNOWN
    if moments.first is None or moments.second is None or new.adopt is None:
        if new.refresh:  # a basis like any other, until its own refresh comes: coordinates would be worse
            slots, _ = new.refresh(new.gradient(normal(key, tuple(p.shape), p.device), slots), slots, key)
        did = "reset: nothing was learned yet" if held else "reset: it was frozen"
        if not held and size and new.adopt is not None:
            rest = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
            slots, _ = new.adopt(Moments(rest, torch.full_like(rest, size), (RESTED, GUESSED)), slots, p, key)
            did = "it was frozen: second moment of its like, first moment zero"
        return slots, Row(name, old.name, new.name, did, nan, nan, nan)
    before = _update(old, held, moments.first, p)
    if _kept_otherwise(old, new, held, slots):
        for slot, t in encoded(decoded(held), decoded(slots), slots, new.names(Kind.SECOND)).items():
            slots[slot].copy_(t)
        did = "kept, in another form"
    else:
        slots, did = new.adopt(moments, slots, p, key)
    del held
    first, energy, total = moments.first, _energy(moments.first), moments.second.sum()
    del moments
    kept = _kept(energy, total, new.export(slots, p)) if new.export else (nan, nan)
    now = _update(new, slots, first, p)
    return slots, Row(name, old.name, new.name, did, *kept, now / before if before else nan)


def _kept(energy: float, total: Tensor, exported: Moments) -> tuple[float, float]:
    """Shares of the first moment's energy and of the summed second moment that what is exported now has."""
    after = complete(exported)
    if after.first is None or after.second is None:
        return float("nan"), float("nan")
    return _energy(after.first) / energy if energy else float("nan"), float(after.second.sum() / total)


def _energy(x: Tensor) -> float:
    """The sum of squares, in float64 a piece at a time: a copy of the whole would be twice as large."""
    return float(torch.stack([_squares(part) for part in torch.split(x.flatten(), PIECE)]).sum())


def _squares(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _update(rule: Rule, slots: Slots, g: Tensor, p: Tensor) -> float:
    """RMS of the update that a gradient equal to the first moment brings, at learning rate 1 and without decay; a piece
    at a time where the rule moves each entry by itself."""
    hyper: Hyper = {key: torch.tensor(value, device=p.device) for key, value in (("lr", 1.0), ("weight_decay", 0.0))}
    if rule.elementwise:
        numbers = rule.names(Kind.COUNTER)
        flat = {slot: t if slot in numbers else t.reshape(-1) for slot, t in slots.items()}
        whole_g, whole_p, parts = g.reshape(-1), p.reshape(-1), []
        for at in range(0, p.numel(), PIECE):
            piece = slice(at, at + PIECE)
            own = {slot: t if slot in numbers else t[piece] for slot, t in flat.items()}
            moved = rule.update(whole_g[piece], own, whole_p[piece], hyper)[0]
            assert moved is not None, rule.name
            parts.append(_squares(moved))
        return math.sqrt(float(torch.stack(parts).sum()) / p.numel())
    delta, new = rule.update(rule.gradient(g, slots), slots, p, hyper)
    if delta is None:
        assert rule.product is not None, rule.name
        delta = rule.product(new) - rule.product(slots)
    del new
    return math.sqrt(_energy(delta) / delta.numel())


def _same(old: Rule, new: Rule, held: Slots, slots: Slots) -> bool:
    """May the slots stay as they are: the same rule with the same options, under wrappers that give the same, and no
    weights among them, as those were merged?"""
    if (old.name, old.options, old.slots) != (new.name, new.options, new.slots) or new.names(Kind.WEIGHT):
        return False
    return _like(held, slots) and all(
        torch.equal(held[slot.name], slots[slot.name]) for slot in new.slots if slot.given
    )


def _kept_otherwise(old: Rule, new: Rule, held: Slots, slots: Slots) -> bool:
    """Do they differ in nothing but what slots are kept in?"""
    if (old.name, plainly(old.options)) != (new.name, plainly(new.options)) or new.names(Kind.WEIGHT):
        return False
    given = [slot.name for slot in new.slots if slot.given]
    return _like(decoded(held), decoded(slots)) and all(torch.equal(held[name], slots[name]) for name in given)


def _like(a: Slots, b: Slots) -> bool:
    """Same slots, shapes and dtypes."""
    return {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
