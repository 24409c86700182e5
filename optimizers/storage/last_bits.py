"""Bfloat16 weights whose last bits are kept beside them: 3 bytes a weight, of which a model shows 2.

    x, float32:    sign, exponent, 23 bits of mantissa        rounded to 15 of them, stochastically given a seed
    weight         the nearest bfloat16 of that (7 bits)      what the model computes with, and files of it hold
    last_bits      the signed difference, in units of the 15th bit: int8, a slot of the rule

The unit is 2^-15 of the power of two below x: the two together are x to within 2^-16 of it where they are rounded to
nearest, and to within 2^-15 where stochastically. Then updates that are smaller still are right on average.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..contract import SEED, Hyper, Kind, Rule, Slot, Slots, UsageError
from ..moments import Moments
from ..random import Key
from ..rounding import draws

LAST_BITS = "last_bits"  # the slot
BELOW, NEAREST = 0xFF, 0x80  # the 8 bits of a float32 that are not kept, and half of their unit
APART = 100  # tells its draws from those of slots


@dataclass(frozen=True)
class Extended:
    """That weights have last bits, over the options of a rule."""

    last_bits: bool
    over: Any


def join(p: Tensor, last: Tensor) -> Tensor:
    """The float32 value of weights (bfloat16) and their last bits (int8)."""
    return (((p.float().view(torch.int32) >> 8) + last) << 8).view(torch.float32)


def split(x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 x as (the bfloat16 nearest to it, as float32; last bits, int8). `noise`: 8 random bits an entry or more,
    which round what is below the last bits; None rounds it to nearest. What is not finite stays so."""
    kept = (x.view(torch.int32) + (NEAREST if noise is None else noise & BELOW)) >> 8
    short = (kept + NEAREST) >> 8
    finite = x.isfinite()
    high = torch.where(finite, (short << 16).view(torch.float32), x)
    return high, torch.where(finite, kept - (short << 8), 0).to(torch.int8)


def extended(rule: Rule) -> Rule:
    """`rule` for bfloat16 weights, which sees and moves them with their last bits, a slot more.

    A weight that the rule leaves alone, as its product is kept apart, stays as it is. `init` raises UsageError for
    weights in another dtype.
    """
    refreshes, exports, adopts, question, product = rule.refresh, rule.export, rule.adopt, rule.built, rule.product

    def inside(slots: Slots) -> Slots:
        return {name: t for name, t in slots.items() if name != LAST_BITS}

    def init(p: Tensor) -> Slots:
        if p.dtype != torch.bfloat16:
            raise UsageError(
                f"last bits are of bfloat16 weights, got {p.dtype}; give --precision bf16+8, or leave them out"
            )
        return {**rule.init(p), LAST_BITS: torch.zeros_like(p, dtype=torch.int8, memory_format=torch.contiguous_format)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        last, seed = slots[LAST_BITS], hyper.get(SEED)
        whole = join(p, last)
        delta, new = rule.update(g, inside(slots), whole, hyper)
        if delta is None:
            return None, {**new, LAST_BITS: last}
        x = whole + delta
        high, last = split(x, None if seed is None else draws(seed, x, APART))
        return high - p.float(), {**new, LAST_BITS: last}

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        assert refreshes is not None
        new, ok = refreshes(g, inside(slots), key, only_missing)
        return slots | new, ok

    def export(slots: Slots, p: Tensor) -> Moments:
        assert exports is not None
        return exports(inside(slots), p)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert adopts is not None
        new, did = adopts(moments, inside(slots), p, key)
        return slots | new, did

    return replace(
        rule,
        options=Extended(True, rule.options),
        slots=(*rule.slots, Slot(LAST_BITS, Kind.BITS)),
        init=init,
        update=update,
        refresh=refresh if refreshes else None,
        export=export if exports else None,
        adopt=adopt if adopts else None,
        built=(lambda slots: question(inside(slots))) if question else None,
        gradient=lambda g, slots: rule.gradient(g, inside(slots)),
        product=(lambda slots: product(inside(slots))) if product else None,
        draws=True,
    )
