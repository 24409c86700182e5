"""Slots as they are kept, and as a rule sees them. What a slot is kept in is read from the tensors themselves.

bfloat16           a slot that is float32 to its rule
int8 or uint8      bytes of `blocks`, with the scales of `name` as a slot `name.scale`
anything else      as it is
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..rounding import draws, to_bfloat16
from ..state import Slots
from . import blocks

SCALE = ".scale"  # behind the name of a slot
LEAST = 2.0**-126  # the smallest normal number of bfloat16


def decoded(slots: Slots) -> Slots:
    """Slots as a rule sees them; a tensor that is kept as it is stays the same object."""
    scales = {name + SCALE for name in slots} & slots.keys()
    return {name: _decoded(t, slots.get(name + SCALE)) for name, t in slots.items() if name not in scales}


def encoded(new: Slots, seen: Slots, kept: Slots, positive: Collection[str] = (), seed: Tensor | None = None) -> Slots:
    """What a rule made of the slots that it has `seen`, in the form of those that are `kept`; what it left as it was is
    the same object as there. Of the slots in `positive` what is above zero stays so. `seed` (0-d int32) rounds
    stochastically; None rounds to nearest."""
    made: Slots = {}
    rounded = [name for name, t in kept.items() if name + SCALE in kept or t.dtype == torch.bfloat16]
    for name, value in new.items():
        which = rounded.index(name) if name in rounded else 0  # whatever else a rule keeps
        own, scale = kept[name], name + SCALE
        if value is seen[name]:
            made[name] = own
            if scale in kept:
                made[scale] = kept[scale]
        elif scale in kept:
            noise = None if seed is None else draws(seed, value, which)
            made[name], made[scale] = blocks.encode(value, own.dtype == torch.uint8, noise)
        elif own.dtype == torch.bfloat16:
            short = value.to(torch.bfloat16) if seed is None else to_bfloat16(value, draws(seed, value, which))
            made[name] = torch.where(value > 0, short.clamp(min=LEAST), short) if name in positive else short
        else:
            made[name] = value
    return made


def unfit(slots: Slots) -> str:
    """The first slot whose bytes and scales do not go together, such as those of a damaged file; "" without one."""
    for name, t in slots.items():
        scale = slots.get(name + SCALE)
        if scale is not None and (
            t.dtype not in (torch.int8, torch.uint8)
            or scale.dtype != torch.float32
            or list(scale.shape) != blocks.scales(t.shape)
        ):
            return name
    return ""


def _decoded(t: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return blocks.decode(t, scale)
    return t.float() if t.dtype == torch.bfloat16 else t
