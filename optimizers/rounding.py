"""Stochastic rounding: up or down with such chances that the result is right on average.

Random bits are a hash of (seed, position), so nothing but the seed has to be saved, and the same graph gives the same
bits anywhere.
"""

import torch
from torch import Tensor

LOW = 0xFFFF


def bits(seed: Tensor, like: Tensor) -> Tensor:
    """32 random bits for each entry of `like`, int32, of its shape. `seed` is a 0-d int32, of which all bits count."""
    position = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape)
    mixed = (position * -1640531527) ^ seed  # 2^32 / golden ratio, as Knuth's multiplicative hash
    for shift, factor in ((16, 2146121005), (15, -2073254261), (16, 1)):  # the "lowbias32" finalizer
        mixed = (mixed ^ ((mixed >> shift) & (0xFFFFFFFF >> shift))) * factor
    return mixed


def draws(seed: Tensor, like: Tensor, which: int) -> Tensor:
    """16 random bits for each entry of `like`, int32 in [0, 2^16): independent for each `which`, and of the bits that
    round a weight with this seed."""
    own = (which // 2 + 1) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = bits(seed ^ (own - 2**32 if own >= 2**31 else own), like)
    return (mixed >> 16 if which % 2 else mixed) & LOW


def to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """x (float32) in bfloat16, given 16 random bits an entry below those that are kept. What is not finite stays so."""
    rounded = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
