"""How many steps a tensor has taken, and the corrections for averages that started from zero."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Kind, Rule, Slots, declare

STEP, CORRECTION = "step", "bias_correction"
TICKED = "corrections of this step"  # no slot: what a kernel that has advanced the clock gives a rule instead
CLOCK = declare(**{STEP: Kind.COUNTER, CORRECTION: Kind.COUNTER})


def clock(p: Tensor) -> Slots:
    """Slots that count: `step` (0-d float32) and `bias_correction` = (1 - beta1^step, 1 - beta2^step), float64.

    The pair is one tensor because torch 2.13 loses, without a word, what a compiled function writes into a 0-d
    float64 tensor on the CPU.
    """
    return {STEP: p.new_zeros((), dtype=torch.float32), CORRECTION: p.new_zeros(2, dtype=torch.float64)}


def tick(slots: Slots, betas: tuple[float, float]) -> tuple[Slots, Tensor, Tensor]:
    """One active step: (the slots of `clock`, 1 - beta1^t, 1 - beta2^t), the two as 0-d float32.

    The corrections are carried by c <- beta c + (1 - beta) because a power of the step inside a fused update is
    evaluated again for every vector of the tensor (1.6 times the time of a whole AdamW update). Where the clock was
    advanced already, by `advance`, there are no slots to return.
    """
    if TICKED in slots:
        return {}, slots[TICKED][0], slots[TICKED][1]
    c1, c2 = (c * beta + (1 - beta) for c, beta in zip(slots[CORRECTION], betas, strict=True))
    return {STEP: slots[STEP] + 1, CORRECTION: torch.stack([c1, c2])}, c1.float(), c2.float()


class Clock(NamedTuple):
    """The clocks of n tensors in one piece of memory: `step` (n,) float32, `correction` (n, 2) float64."""

    step: Tensor
    correction: Tensor


def shared(rules: Sequence[Rule]) -> list[list[int]]:
    """Which of these tensors, by their places, have clocks that are advanced together: those of equal decays."""
    places: dict[tuple[float, float], list[int]] = {}
    for i, rule in enumerate(rules):
        if rule.betas is not None:
            places.setdefault(rule.betas, []).append(i)
    return list(places.values())


def advance(clock: Clock, betas: tuple[float, float]) -> Tensor:
    """One active step of all its tensors, in place; the corrections, (n, 2) float32."""
    new = torch.stack([clock.correction[:, i] * beta + (1 - beta) for i, beta in enumerate(betas)], 1)
    clock.step.add_(1)
    clock.correction.copy_(new)
    return new.float()


class Clocks:
    """Clocks of tensors that one kernel moves: the slots of each are rows of one piece of memory.

    So a kernel advances them all at once, while each counts its own steps: files, masks and refreshes see slots as
    ever. Where somebody has put other slots into a state, they are gathered anew, which waits for nothing.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, ...], tuple[Clock, list[Slots]]] = {}

    def of(
        self, names: Sequence[str], rules: Sequence[Rule], slots: Sequence[Slots]
    ) -> tuple[list[Clock], list[Slots]]:
        """(a clock for each of `shared(rules)`, the slots without what is in them)."""
        clocks, bare = [], list(slots)
        for places in shared(rules):
            key, held = tuple(names[i] for i in places), [slots[i] for i in places]
            made = self._made.get(key)
            if made is None or any(
                s[slot] is not row[slot] for s, row in zip(held, made[1], strict=True) for slot in row
            ):
                made = self._made[key] = _gathered(held)
            clocks.append(made[0])
            for i in places:
                bare[i] = {slot: t for slot, t in slots[i].items() if slot not in (STEP, CORRECTION)}
        return clocks, bare


def _gathered(held: Sequence[Slots]) -> tuple[Clock, list[Slots]]:
    """The clocks of these tensors as one, of which their slots are rows from now on; and the rows."""
    clock = Clock(*(torch.stack([slots[slot] for slots in held]) for slot in (STEP, CORRECTION)))
    rows: list[Slots] = [{STEP: step, CORRECTION: c} for step, c in zip(*map(Tensor.unbind, clock), strict=True)]
    for slots, row in zip(held, rows, strict=True):
        slots.update(row)
    return clock, rows
