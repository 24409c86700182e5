"""A learning rate that rises again wherever a tensor gets its turn: in a mask, or in a new subspace.

    a <- 0                                   where a turn begins
    a <- a + 1;   lr <- lr min(a / K, 1)     at each of its active steps

Moments that start anew make the first steps of a turn its worst ones: AdamW's first step is the sign of a gradient.
That a rate rises over the first steps is older than all of this; that it does so at each turn is ours.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contract import Hyper, Kind, Rule, Slot, Slots
from ..moments import Moments
from ..random import Key

AGE = "age"


@dataclass(frozen=True)
class Warming:
    """Over how many steps of a turn the learning rate rises, over the options of a rule."""

    turn_warmup: int
    over: Any


def rising(hyper: Hyper, age: Tensor, steps: int) -> Hyper:
    """`hyper` with the rate of the `age`-th step of a turn (0-d, the first is 1), of which `steps` rise."""
    return {**hyper, "lr": hyper["lr"] * (age / steps).clamp(max=1)}


def unused(name: str, taken: Collection[str]) -> str:
    """`name` for a slot, with a number behind it where slots of that name are `taken`."""
    return f"{name}{sum(slot.startswith(name) for slot in taken) + 1}" if name in taken else name


def warming(rule: Rule, steps: int, own: str = AGE) -> Rule:
    """`rule` whose learning rate, that of its decay too, rises along a line over the first `steps` of a turn.

    The slot `own` (0-d float32) counts the steps of the turn. Who begins one sets it to 0, and it is 0 at the start. A
    state that is taken over from another rule is as old as the gradients that it has seen.
    """

    def inside(slots: Slots) -> Slots:
        return {slot: t for slot, t in slots.items() if slot != own}

    def init(p: Tensor) -> Slots:
        return {**rule.init(p), own: p.new_zeros((), dtype=torch.float32)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        age = slots[own] + 1
        delta, new = rule.update(g, inside(slots), p, rising(hyper, age, steps))
        return delta, {**new, own: age}

    def export(slots: Slots, p: Tensor) -> Moments:
        assert rule.export is not None
        return rule.export(inside(slots), p)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert rule.adopt is not None
        new, did = rule.adopt(moments, inside(slots), p, key)
        return {**new, own: torch.full_like(slots[own], max(moments.seen))}, did

    return replace(
        rule,
        options=Warming(steps, rule.options),
        slots=(*rule.slots, Slot(own, Kind.COUNTER)),
        init=init,
        update=update,
        export=export if rule.export else None,
        adopt=adopt if rule.adopt else None,
    )
