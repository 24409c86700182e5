"""Orthogonal projections P of rank r on one side of a matrix (P P* = I), each a few small tensors.

    kind                      tensors                   P G where m >= n          P G where m < n
    svd range auto random     basis (short, r)          G Q             (m, r)    Q^T G           (r, n)
    srht                      index (r), signs (short)  columns of G D H (m, r)   rows of H D G   (r, n)
    topk uniform              index (r)                 rows of G       (r, n)    columns of G    (m, r)

svd, range and topk follow G: its leading singular directions, exact or by a randomized range finder ("auto" takes the
exact ones up to a side of 128), or its slices of the largest norm. The others are random: Haar, a subsampled
randomized Hadamard transform (H from `linalg.transform`, D random signs), uniformly chosen slices.
"""

import torch
from torch import Tensor

from . import linalg
from .core import Slots
from .random import Key, fold, permutation, signs

KINDS = ("auto", "svd", "range", "random", "srht", "topk", "uniform")


def compressed(kind: str, x: Tensor) -> int:
    """The dimension of x that has r entries in P x."""
    return linalg.longer(x) if kind in ("topk", "uniform") else linalg.shorter(x)


def blank(kind: str, p: Tensor, rank: int) -> Slots:
    """A valid projection before any gradient was seen, draws nothing; UsageError where the rank does not fit."""
    linalg.check_rank(p, rank)
    index = torch.arange(rank, device=p.device)
    if kind == "srht":
        return {"index": index, "signs": p.new_ones(min(p.shape[-2:]), dtype=torch.int8)}
    if kind == "topk":
        return {"index": index.expand(*p.shape[:-2], rank).contiguous()}
    return {"index": index} if kind == "uniform" else {"basis": linalg.first_basis(p, rank)}


def draw(kind: str, g: Tensor, rank: int, key: Key) -> tuple[Slots, Tensor]:
    """(a new projection for g, 0-d bool: it can be used, as g is finite and not zero)."""
    ok, side = linalg.informative(g), g.shape[compressed(kind, g)]
    if kind == "random":
        return {"basis": linalg.random_basis(g, rank, key)}, ok
    if kind == "topk":
        return {"index": g.float().norm(dim=linalg.shorter(g)).topk(rank).indices.sort().values}, ok
    if kind in ("uniform", "srht"):
        index = {"index": permutation(fold(key, "index"), side, g.device)[:rank].sort().values}
        return index if kind == "uniform" else {**index, "signs": signs(key, side, g.device).to(torch.int8)}, ok
    if kind == "svd" or (kind == "auto" and side <= 128):
        return {"basis": linalg.svd_basis(torch.where(ok, g, 0), rank)}, ok
    basis = linalg.range_basis(g, rank, key)
    return {"basis": basis}, ok & basis.isfinite().all()


def down(x: Tensor, q: Slots) -> Tensor:
    """P x."""
    if "basis" in q:
        return linalg.project(x, q["basis"])
    x, dim = (linalg.mix(x, q["signs"]), linalg.shorter(x)) if "signs" in q else (x, linalg.longer(x))
    return linalg.take(x, q["index"], dim)


def up(c: Tensor, q: Slots, like: Tensor) -> Tensor:
    """P* c, of `like`'s shape."""
    if "basis" in q:
        return linalg.lift(c, q["basis"], like)
    spread, chosen = linalg.spread(c, q["index"], linalg.shorter(like) if "signs" in q else linalg.longer(like), like)
    x = torch.where(chosen, spread, 0)
    return linalg.unmix(x, q["signs"]) if "signs" in q else x


def average(g: Tensor, m: Tensor, weight: float, q: Slots, gain: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """(gain P* m' + g - P* P g, m') with m' = m + weight (P g - m): a moving average in the subspace, g outside it.

    Two products of g's size for a basis. Slices are picked up and put back by gathers, which a compiler fuses with
    what follows, so nothing of g's size is stored.
    """
    if "basis" in q:
        c = linalg.project(g, q["basis"])
        new = m.lerp(c, weight)
        return g - linalg.lift(c - gain * new, q["basis"], g), new  # a sum would become addmm, which copies g first
    x, dim = (linalg.mix(g, q["signs"]), linalg.shorter(g)) if "signs" in q else (g, linalg.longer(g))
    spread, chosen = linalg.spread(m, q["index"], dim, g)
    out = torch.where(chosen, gain * spread.lerp(x, weight), x)
    new = m.lerp(linalg.take(x, q["index"], dim), weight)
    return linalg.unmix(out, q["signs"]) if "signs" in q else out, new
