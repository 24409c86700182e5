"""Orthogonal projections P of rank r on one side of a matrix (P P* = I), each a few small tensors.

    kind                      tensors                   P G where m >= n          P G where m < n
    svd range auto random     basis (short, r)          G Q             (m, r)    Q^T G           (r, n)
    srht                      index (r), signs (short)  columns of G D H (m, r)   rows of H D G   (r, n)
    topk uniform              index (r)                 rows of G       (r, n)    columns of G    (m, r)

svd, range and topk follow G: its leading singular directions, exact or by a randomized range finder ("auto" takes the
exact ones up to a side of 128), or its slices of the largest norm, largest first. The others are random: Haar, a
subsampled randomized Hadamard transform (H from `linalg.transform`, D random signs), uniformly chosen slices, in the
order drawn: whoever keeps coordinates by their position, as the authors' first release does for a step, sees it.

Before the first one is drawn a basis is zero, and an index negative (counted from the end).
"""

import torch
from torch import Tensor

from ..contract import Kind, Slots
from ..random import Key, fold, permutation, signs
from . import bases as linalg

KINDS = ("auto", "svd", "range", "random", "srht", "topk", "uniform")


def compressed(kind: str, x: Tensor) -> int:
    """The dimension of x that has r entries in P x."""
    return linalg.longer(x) if kind in ("topk", "uniform") else linalg.shorter(x)


def blank(kind: str, p: Tensor, rank: int) -> Slots:
    """What stands there before any gradient was seen, draws nothing; UsageError where the rank does not fit."""
    linalg.check_rank(p, rank)
    index = torch.arange(rank, device=p.device) - p.shape[compressed(kind, p)]
    if kind == "srht":
        return {"index": index, "signs": p.new_ones(min(p.shape[-2:]), dtype=torch.int8)}
    if kind == "topk":
        return {"index": index.expand(*p.shape[:-2], rank).contiguous()}
    return {"index": index} if kind == "uniform" else {"basis": linalg.no_basis(p, rank)}


def kinds(kind: str) -> dict[str, Kind]:
    """The slots of a projection."""
    if kind in ("topk", "uniform"):
        return {"index": Kind.INDEX}
    return {"index": Kind.INDEX, "signs": Kind.BASIS} if kind == "srht" else {"basis": Kind.BASIS}


def missing(slots: Slots) -> Tensor:
    """Where no projection was drawn yet: (..., 1, 1) bool, without leading dimensions where matrices share it."""
    if "basis" in slots:
        return linalg.missing(slots["basis"])
    return (slots["index"] < 0).any(-1)[..., None, None]


def draw(kind: str, g: Tensor, rank: int, key: Key) -> tuple[Slots, Tensor]:
    """(a new projection for g, 0-d bool: it can be used, as g is finite and not zero)."""
    x, good = linalg.directions(g)
    drawn = _drawn(kind, x, rank, key)
    taken = good & linalg.finite(drawn["basis"]) if "basis" in drawn else good
    return drawn, linalg.rebuilt(g, good, taken)


def renew(
    kind: str, g: Tensor, slots: Slots, rank: int, key: Key, only_missing: bool = False
) -> tuple[Slots, Tensor, Tensor]:
    """(`slots` of the projection after a refresh, which matrices of g have a new one (..., 1, 1), the refresh's `ok`).

    A matrix whose gradient says nothing keeps what it has; so do those that have one, with `only_missing`.
    """
    x, good = linalg.directions(g)
    if kind in ("random", "uniform", "srht"):  # one for the whole stack, if any of it has a gradient
        good = (g.isfinite().all() & good.any()).expand_as(good)
    wanted = good & missing(slots) if only_missing else good
    drawn = _drawn(kind, x, rank, key)
    taken = wanted & linalg.finite(drawn["basis"]) if "basis" in drawn else wanted
    ok = linalg.rebuilt(g, wanted, taken)
    new = {}
    for slot, value in drawn.items():
        where = taken if slot == "basis" else taken[..., 0] if value.ndim > 1 else taken.all()
        new[slot] = torch.where(where, value, slots[slot]).contiguous()
    return new, taken, ok


def _drawn(kind: str, x: Tensor, rank: int, key: Key) -> Slots:
    """A projection for x, which is finite and about 1."""
    side = x.shape[compressed(kind, x)]
    if kind == "random":
        return {"basis": linalg.random_basis(x, rank, key)}
    if kind == "topk":
        return {"index": x.norm(dim=linalg.shorter(x)).topk(rank).indices}
    if kind in ("uniform", "srht"):
        index = {"index": permutation(fold(key, "index"), side, x.device)[:rank]}
        return index if kind == "uniform" else {**index, "signs": signs(key, side, x.device).to(torch.int8)}
    exact = kind == "svd" or (kind == "auto" and side <= 128)
    return {"basis": linalg.svd_basis(x, rank) if exact else linalg.range_basis(x, rank, key)}


def _positions(q: Slots, size: int) -> Tensor:
    """Where the slices are, also before any was drawn."""
    return torch.where(q["index"] < 0, q["index"] + size, q["index"])


def down(x: Tensor, q: Slots) -> Tensor:
    """P x."""
    if "basis" in q:
        return linalg.project(x, q["basis"])
    x, dim = (linalg.mix(x, q["signs"]), linalg.shorter(x)) if "signs" in q else (x, linalg.longer(x))
    return linalg.take(x, _positions(q, x.shape[dim]), dim)


def up(c: Tensor, q: Slots, like: Tensor) -> Tensor:
    """P* c, of `like`'s shape."""
    if "basis" in q:
        return linalg.lift(c, q["basis"], like)
    dim = linalg.shorter(like) if "signs" in q else linalg.longer(like)
    spread, chosen = linalg.spread(c, _positions(q, like.shape[dim]), dim, like)
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
    index = _positions(q, g.shape[dim])
    spread, chosen = linalg.spread(m, index, dim, g)
    out = torch.where(chosen, gain * spread.lerp(x, weight), x)
    new = m.lerp(linalg.take(x, index, dim), weight)
    return linalg.unmix(out, q["signs"]) if "signs" in q else out, new
