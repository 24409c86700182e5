"""Float32 values as bytes with a scale for each block of them: the int8 form of moments.

    signed     q in [-127, 127]     x = s q |q| / 127^2                 first moments
    positive   q in [0, 255]        x = s (q / 255)^4                   second moments

s is the largest magnitude of a block, float32. Both maps are dense near zero: next to the largest value of a block one
of 6e-5 of it (2e-10 of second moments, whose root is what is divided by) is still told from zero. Values between two
levels are rounded stochastically, to either with such chances that the mean is right; the largest is exact. A second
moment above zero never becomes zero: what lies below the first level is raised to it, since a step divided by the root
of zero would be the largest of all.

A block is a part of a row: as many values as the largest divisor of its length that is at most 256. Of rows that have
no divisor from 32 up, blocks are 128 values of the flattened tensor, the last one shorter. So a scale costs 4/256 of a
byte a value in the usual case, and no block crosses a row, whose sizes are most alike. A block that holds a value which
is not finite is NaN or infinite as a whole.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import largest_divisor

LONGEST, SHORTEST, FLAT = 256, 32, 128
SIGNED, POSITIVE = 127, 255  # the largest level of each map


def scales(shape: torch.Size) -> list[int]:
    """The shape of the scales of a tensor of this shape."""
    size = _in_row(shape)
    return [*shape[:-1], shape[-1] // size] if size else [ceil(shape.numel() / FLAT)]


def encode(x: Tensor, positive: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(int8, or uint8 where `positive`, of x's shape; float32 scales), of float32 x.

    `noise`: 16 random bits an entry (see `rounding.draws`); without them levels are the nearest ones, and what was
    decoded is encoded to the same bytes. A `positive` x has no entry below zero.
    """
    top = POSITIVE if positive else SIGNED
    parts = _blocks(x)
    size = parts.abs()
    scale = size.amax(-1, keepdim=True)
    unit = torch.where(scale > 0, 1 / scale, 0).clamp(max=torch.finfo(torch.float32).max)
    power = 4 if positive else 2
    a = size * unit * float(top**power)  # in [0, top^power]
    root = a.sqrt().sqrt() if positive else a.sqrt()
    low = root.floor().clamp(max=top - 1)
    below = low.square().square() if positive else low.square()
    step = (low + 1).square().square() - below if positive else 2 * low + 1
    chance = 0.5 if noise is None else (_blocks(noise).float() + 0.5) * 2.0**-16
    q = torch.where(a - below > chance * step, low + 1, low)
    q = torch.where(parts > 0, q.clamp(min=1), 0) if positive else torch.where(parts < 0, -q, q)
    return _whole(q.to(torch.uint8 if positive else torch.int8), x), scale.squeeze(-1)


def decode(q: Tensor, scale: Tensor) -> Tensor:
    """The values, float32, of bytes and scales that `encode` gave."""
    level = _blocks(q).float()
    if q.dtype == torch.uint8:
        share = level.square().square() * (1 / POSITIVE**4)
    else:
        share = level * level.abs() * (1 / SIGNED**2)  # exactly 1 at the largest level, as is the other
    return _whole(share * scale[..., None], q)


def _in_row(shape: torch.Size) -> int:
    """Values of a block within a row; 0 where blocks are those of the flattened tensor."""
    size = largest_divisor(shape[-1], LONGEST) if shape and shape[-1] else 0
    return size if size >= SHORTEST else 0


def _blocks(x: Tensor) -> Tensor:
    """x as (..., blocks, values of a block), with zeros behind the last one."""
    if size := _in_row(x.shape):
        return x.reshape(*x.shape[:-1], -1, size)
    flat = x.reshape(-1)
    return F.pad(flat, (0, -len(flat) % FLAT)).view(-1, FLAT)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    """`_blocks` undone."""
    if _in_row(like.shape):
        return parts.flatten(-2)
    return parts.reshape(-1)[: like.numel()].view(like.shape)
