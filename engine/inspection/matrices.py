"""What can be measured of a matrix, or of a stack of them (..., m, n): its size and spectrum, what a basis holds.

What cannot be told is NaN.
"""

import math

import torch
from torch import Tensor

from optimizers import linalg
from optimizers.random import Key

EXACT = 512  # the shorter side up to which all singular values are computed; beyond, the leading ones
LEADING = 64  # at most so many


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt()) if x.numel() else math.nan


def spectrum(x: Tensor) -> Tensor:
    """Singular values (..., k), largest first: all where the shorter side is small, else the leading ones, of which
    a randomized range finder underestimates the last by some percent. NaN where x is not finite."""
    x, short = x.float(), min(x.shape[-2:])
    if not x.isfinite().all():
        return x.new_full((*x.shape[:-2], min(short, LEADING)), math.nan)
    if short > EXACT:
        x = linalg.project(x, linalg.range_basis(x, LEADING, Key(0), oversample=LEADING, power=2))
    values: Tensor = torch.linalg.svdvals(x)
    return values


def stable_rank(values: Tensor, squared: Tensor) -> float:
    """||X||^2 / s1^2 from X's singular values and its squared norm; the mean over a batch."""
    return float((squared / values[..., 0].square()).mean())


def leading(values: Tensor, squared: Tensor, side: int) -> float:
    """The share of ||X||^2 in the leading quarter of the directions of its shorter side."""
    k = max(1, min(side // 4, LEADING))
    return float((values[..., :k].square().sum(-1) / squared).mean())


def basis_error(q: Tensor) -> float:
    """||Q^T Q - I||, the largest of a batch."""
    q = q.float()
    gap = q.mT @ q - torch.eye(q.shape[-1], device=q.device)
    return float(gap.square().sum((-2, -1)).sqrt().max())


def captured(x: Tensor, q: Tensor, other: bool) -> float:
    """||Q^T X||^2 / ||X||^2, Q on X's shorter side, or the `other`."""
    x = x.float()
    return float(linalg.project(x, q, other).square().sum() / x.square().sum())
