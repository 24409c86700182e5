"""What a mask makes of a rule: one whose gradient or update is scaled, and one on some entries of a tensor alone."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..contract import Hyper, Kind, Rule, Slot, Slots
from ..moments import Moments
from ..random import Key

ENTRIES = "entries"  # the slot that says which entries of a tensor train


@dataclass(frozen=True)
class Scaled:
    """How a mask's scale is used, over the options of a rule."""

    mode: Literal["grad", "update"]
    over: Any


@dataclass(frozen=True)
class Gathered:
    """Into how many masks a tensor's entries are split, over the options of a rule."""

    masks: int
    over: Any


def scaled(rule: Rule, mode: Literal["grad", "update"], own: str = "scale") -> Rule:
    """`rule` with its gradient, or its update, multiplied by its `own` slot."""
    apart = rule.names(Kind.WEIGHT)

    def inside(slots: Slots) -> Slots:
        return {slot: t for slot, t in slots.items() if slot != own}

    def init(p: Tensor) -> Slots:
        return {**rule.init(p), own: p.new_ones((), dtype=torch.float32)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        scale = slots[own]
        delta, new = rule.update(g.float() * scale if mode == "grad" else g, inside(slots), p, hyper)
        if mode == "update":
            delta = delta * scale if delta is not None else None
            new = new | {slot: slots[slot] + scale * (new[slot] - slots[slot]) for slot in apart}
        return delta, {**new, own: scale}

    def times(moments: Moments, factor: Tensor) -> Moments:
        if mode == "update":
            return moments
        first, second, seen = moments
        return Moments(None if first is None else first * factor, None if second is None else second * factor**2, seen)

    def export(slots: Slots, p: Tensor) -> Moments:
        assert rule.export is not None
        return times(rule.export(inside(slots), p), 1 / slots[own])

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert rule.adopt is not None
        new, did = rule.adopt(times(moments, slots[own]), inside(slots), p, key)
        return {**new, own: slots[own]}, did

    return replace(
        rule,
        options=Scaled(mode, rule.options),
        slots=(*rule.slots, Slot(own, Kind.COUNTER, given=True)),
        init=init,
        update=update,
        export=export if rule.export else None,
        adopt=adopt if rule.adopt else None,
    )


def gathered(rule: Rule, masks: int) -> Rule:
    """`rule` on the `entries` (int32 (k,)) of a tensor alone: state holds k entries, the others stay as they are."""

    def init(p: Tensor) -> Slots:
        entries = torch.arange(p.numel() // masks, dtype=torch.int32, device=p.device)
        return {**rule.init(p.detach().flatten()[: len(entries)]), ENTRIES: entries}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        entries = slots[ENTRIES]
        where = entries.long()
        own = {slot: t for slot, t in slots.items() if slot != ENTRIES}
        delta, new = rule.update(g.flatten()[where], own, p.flatten()[where], hyper)
        if delta is not None:
            still = delta.new_full((p.numel(),), -0.0)  # x + -0 is x for every x, 0 would change -0
            delta = still.scatter(0, where, delta).view(p.shape)
        return delta, {**new, ENTRIES: entries}

    slots = (*rule.slots, Slot(ENTRIES, Kind.INDEX, given=True))
    return Rule(rule.name, Gathered(masks, rule.options), slots, init, update, draws=rule.draws)
