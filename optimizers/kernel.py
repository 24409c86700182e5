"""The hot update of one segment: every tensor's rule, results written in place, one graph for all like segments.

A pure update followed by `copy_` into the old buffers inside one compiled function allocates nothing, so rules stay
pure and memory stays flat. The kernel works on lists, not on names, so that all blocks of a model share it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .apply import Bound, move, rebuild
from .clock import TICKED, Clock, advance, shared
from .contract import Hyper, Rule, Slots
from .random import Key, word


class Kernel(Protocol):
    """What `make_kernel` makes."""

    def __call__(
        self,
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        params: Sequence[Tensor],
        hypers: Sequence[Hyper],
        bound: Tensor,
        seed: Tensor | None,
        clocks: Sequence[Clock] = (),
    ) -> Tensor: ...


def make_kernel(rules: Sequence[Rule], clip: Bound = "none", stochastic: bool = True) -> Kernel:
    """A function (grads, slots, params, hypers, bound, seed) -> squared gradient norms, (len(rules),) float32.

    It moves `params` and `slots` in place, each by `move`, to which `clip` and the 0-d `bound` go. The norms are those
    before clipping. `seed` (len(rules),) int32, one a parameter, is for rules that draw, and where `stochastic` rounds
    bfloat16 parameters; None rounds to nearest. With `clocks`, as
    `Clocks` gives them, `slots` lack what is in them.
    """
    together = shared(rules)

    def kernel(
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        params: Sequence[Tensor],
        hypers: Sequence[Hyper],
        bound: Tensor,
        seed: Tensor | None,
        clocks: Sequence[Clock] = (),
    ) -> Tensor:
        squares, slots = [], list(slots)
        for places, clock in zip(together if clocks else (), clocks, strict=True):
            betas = rules[places[0]].betas
            assert betas is not None, rules[places[0]].name
            for i, corrections in zip(places, advance(clock, betas), strict=True):
                slots[i] = {**slots[i], TICKED: corrections}
        for i, (rule, g, old, p, hyper) in enumerate(zip(rules, grads, slots, params, hypers, strict=True)):
            own = None if seed is None else seed[i]
            moved, new, square = move(rule, g, old, p, hyper, clip=clip, bound=bound, seed=own, stochastic=stochastic)
            squares.append(square)
            if moved is not p:
                p.copy_(moved)
            for slot, value in new.items():
                if value is not old[slot]:
                    old[slot].copy_(value)
        return torch.stack(squares)

    return kernel


def rebuild_in_place(
    rule: Rule, name: str, g: Tensor, slots: Slots, step: int, key: Key, only_missing: bool = False
) -> Tensor:
    """`rebuild`, its results written into `slots`; returns whether the gradient was usable."""
    new, ok = rebuild(rule, name, g, slots, step, key, only_missing)
    for slot, value in new.items():
        if value is not slots[slot]:
            slots[slot].copy_(value)
    return ok


class Seeds:
    """Of stochastic rounding: for each tensor and step another one, and no pattern returns.

    A tensor's own number goes to the device once. What a step adds to it is made there, so that no step waits.
    """

    def __init__(self, key: Key, device: torch.device) -> None:
        self._key, self._device = key, device
        self._own: dict[tuple[str, ...], Tensor] = {}

    def at(self, names: tuple[str, ...], step: int) -> Tensor:
        """(len(names),) int32."""
        if names not in self._own:
            words = [word(self._key, "rounding", name) for name in names]
            self._own[names] = torch.tensor(words, dtype=torch.int32, device=self._device)
        factor, shift = (word(self._key, part, step) for part in ("rounding factor", "rounding shift"))
        return self._own[names] * (factor | 1) + shift  # odd: numbers that differ stay different
