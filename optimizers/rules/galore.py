"""GaLore: Zhao et al., "Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.

    every T steps   Q <- leading r singular directions of G, shorter side      (Q^T Q = I)
    C = Q^T G   (or G Q)                                                       project
    M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C^2                     Adam in the subspace
    N = sqrt(1 - b2^t) / (1 - b1^t)  M / (sqrt(V) + eps)
    W <- W - lr scale Q N;        W <- (1 - lr wd) W                           lift

As its authors' code: eps 1e-6 outside the bias correction, decay after the step, refresh at 0-based t mod T = 0.

Where this differs. `moments` says what happens to M and V when the basis changes: the authors "keep" stale
coordinates (also the default here, so that results compare); "reset" starts them anew, and with them t, which the bias
correction counts; "rotate" carries M over with R = Q_new^T Q_old and V with R squared entry by entry, its expectation
for independent coordinates (ours). The basis comes from a randomized range finder unless `basis="svd"`. A gradient that
is not finite, or all zero, keeps the old basis; where there is none yet, the first that says something gives it.
Refreshes are staggered over tensors by `partition` unless told otherwise.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import linalg
from ..clock import CLOCK, clock, tick
from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..linalg import lift, project
from ..moments import Moments, clocked, factored, unbiased
from ..random import Key


@dataclass(frozen=True)
class GaLore:
    """GaLore's settings."""

    rank: int = 128
    """Dimension of the subspace."""
    update_proj_gap: int = 200
    """Steps between two bases."""
    scale: float = 0.25
    """What an update is multiplied by."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """What is added to the root of the second moment."""
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """What happens to the moments when the basis changes."""
    basis: Literal["range", "svd"] = "range"
    """Leading directions of the gradient: by a randomized range finder, or exact."""


def build(name: str, options: GaLore) -> Rule:
    """Slots: `basis` (short, r), `exp_avg` and `exp_avg_sq` (m, r) or (r, n), float32, and the scalars of `clock`.

    Raises UsageError for a rank above the shorter side, for 1-D tensors and for unknown options.
    """
    rank, update_proj_gap, scale, betas = options.rank, options.update_proj_gap, options.scale, options.betas
    eps, moments, basis = options.eps, options.moments, options.basis
    b1, b2 = betas
    if moments not in ("keep", "reset", "rotate"):
        raise UsageError(f"galore: moments must be 'keep', 'reset' or 'rotate', got {moments!r}")
    if update_proj_gap < 1:
        raise UsageError(f"galore: update_proj_gap must be at least 1, got {update_proj_gap}")
    if basis not in ("range", "svd"):
        raise UsageError(f"galore: basis must be 'range' or 'svd', got {basis!r}")

    def init(p: Tensor) -> Slots:
        linalg.check_rank(p, rank)
        q = linalg.no_basis(p, rank)
        zeros = torch.zeros_like(project(p.float(), q), memory_format=torch.contiguous_format)
        return {**clock(p), "basis": q, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def leading(x: Tensor, key: Key) -> Tensor:
        return linalg.svd_basis(x, rank) if basis == "svd" else linalg.range_basis(x, rank, key)

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        old, (x, wanted) = slots["basis"], linalg.directions(g)
        if only_missing:
            wanted = wanted & linalg.missing(old)
        new = leading(x, key)
        taken = wanted & linalg.finite(new)
        q = torch.where(taken, new, old).contiguous()
        out, m, v = slots | {"basis": q}, slots["exp_avg"], slots["exp_avg_sq"]
        if moments == "reset" and not only_missing:  # of a whole stack, as its matrices share a clock
            fresh = {**clock(g), "exp_avg": torch.zeros_like(m), "exp_avg_sq": torch.zeros_like(v)}
            out |= {slot: torch.where(taken.any(), value, slots[slot]) for slot, value in fresh.items()}
        elif moments == "rotate":
            r = q.mT @ old
            out["exp_avg"] = torch.where(taken, linalg.rotate(m, r, g), m).contiguous()
            finite = v.clamp(max=torch.finfo(v.dtype).max)  # squares beyond float32: infinity times 0 is not a number
            out["exp_avg_sq"] = torch.where(taken, linalg.rotate(finite, r * r, g), v).contiguous()
        return out, linalg.rebuilt(g, wanted, taken)

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        q, lr = slots["basis"], hyper["lr"]
        scalars, c1, c2 = tick(slots, betas)
        c = project(g.float(), q)
        m = slots["exp_avg"].lerp(c, 1 - b1)
        v = slots["exp_avg_sq"] * b2 + (1 - b2) * c * c
        n = m / (v.sqrt() + eps)
        decay = lr * hyper["weight_decay"]
        delta = -(1 - decay) * lr * scale * c2.sqrt() / c1 * lift(n, q, p) - decay * p.float()
        return delta, {**scalars, "basis": q, "exp_avg": m, "exp_avg_sq": v}

    def export(slots: Slots, p: Tensor) -> Moments:
        q = slots["basis"]
        second = factored(lift(slots["exp_avg_sq"], q.square(), p))  # coordinates taken as independent
        return unbiased(slots, lift(slots["exp_avg"], q, p), second)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        scalars, c1, c2 = clocked(moments, betas, p)
        assert moments.first is not None and moments.second is not None
        x, good = linalg.directions(moments.first)
        new = leading(x, key)
        q = torch.where(good & linalg.finite(new), new, slots["basis"]).contiguous()
        m, v = project(moments.first * c1, q), project(moments.second * c2, q.square())
        return {**scalars, "basis": q, "exp_avg": m.contiguous(), "exp_avg_sq": v.contiguous()}, "projected"

    def built(slots: Slots) -> Tensor:
        return ~linalg.missing(slots["basis"]).any()

    slots = (*CLOCK, *declare(basis=Kind.BASIS, exp_avg=Kind.FIRST, exp_avg_sq=Kind.SECOND))
    return Rule(name, options, slots, init, update, refresh, update_proj_gap, 0, export, adopt, built, betas=betas)


galore = Family("galore", GaLore, build)
