"""GaLore: Zhao et al., "Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.

    every T steps   Q <- leading r singular directions of G, shorter side      (Q^T Q = I)
    C = Q^T G   (or G Q)                                                       project
    M <- b1 M + (1 - b1) C        V <- b2 V + (1 - b2) C^2                     Adam in the subspace
    N = sqrt(1 - b2^t) / (1 - b1^t)  M / (sqrt(V) + eps)
    W <- W - lr scale Q N;        W <- (1 - lr wd) W                           lift

As its authors' code: eps 1e-6 outside the bias correction, decay after the step, refresh at 0-based t mod T = 0.

Where this differs. `moments` says what happens to M and V when the basis changes: the authors "keep" stale
coordinates (also the default here, so that results compare); "reset" starts them anew; "rotate" carries M over with
R = Q_new^T Q_old and V with R squared entry by entry, its expectation for independent coordinates (ours). The basis
comes from a randomized range finder unless `basis="svd"`. A gradient that is not finite, or all zero, keeps the old
basis. Refreshes are staggered over tensors by `core.partition` unless told otherwise.
"""

import torch
from torch import Tensor

from .core import Hyper, Rule, Slots, UsageError, clock, tick
from .linalg import check_rank, first_basis, keep_unless_ok, lift, project, range_basis, rotate, svd_basis, usable
from .moments import Moments, clocked, factored, unbiased
from .random import Key


def galore(
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    moments: str = "keep",
    basis: str = "range",
) -> Rule:
    """Slots: `basis` (short, r), `exp_avg` and `exp_avg_sq` (m, r) or (r, n), float32, and the scalars of `core.clock`.

    Raises UsageError for a rank above the shorter side, for 1-D tensors and for unknown options.
    """
    b1, b2 = betas
    if moments not in ("keep", "reset", "rotate"):
        raise UsageError(f"galore: moments must be 'keep', 'reset' or 'rotate', got {moments!r}")
    if update_proj_gap < 1:
        raise UsageError(f"galore: update_proj_gap must be at least 1, got {update_proj_gap}")
    if basis not in ("range", "svd"):
        raise UsageError(f"galore: basis must be 'range' or 'svd', got {basis!r}")

    def init(p: Tensor) -> Slots:
        check_rank(p, rank)
        q = first_basis(p, rank)
        zeros = torch.zeros_like(project(p.float(), q), memory_format=torch.contiguous_format)
        return {**clock(p), "basis": q, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def refresh(g: Tensor, slots: Slots, key: Key) -> tuple[Slots, Tensor]:
        g, ok = usable(g)
        new = svd_basis(g, rank) if basis == "svd" else range_basis(g, rank, key)
        q = keep_unless_ok(new, slots["basis"], ok & new.isfinite().all())
        m, v = slots["exp_avg"], slots["exp_avg_sq"]
        if moments == "reset":
            m, v = (torch.where(ok, 0, x) for x in (m, v))
        elif moments == "rotate":
            r = q.mT @ slots["basis"]
            m, v = rotate(m, r, g), rotate(v, r * r, g)
        return slots | {"basis": q, "exp_avg": m.contiguous(), "exp_avg_sq": v.contiguous()}, ok

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
        q = refresh(moments.first, slots, key)[0]["basis"]
        m, v = project(moments.first * c1, q), project(moments.second * c2, q.square())
        return {**scalars, "basis": q, "exp_avg": m.contiguous(), "exp_avg_sq": v.contiguous()}, "projected"

    return Rule("galore", init, update, refresh, update_proj_gap, export=export, adopt=adopt)
