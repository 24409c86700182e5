"""Subset-Norm and Subspace-Momentum: Nguyen & Nguyen, "Lean and Mean Adaptive Optimization via Subset-Norm and
Subspace-Momentum with Convergence Guarantees", ICML 2025, arXiv 2411.07120.

    every tau steps   P <- new projection of rank r (P P* = I);  m <- 0
    m <- b1 m + (1 - b1) P G                       momentum, in the subspace
    num = P* m + (G - P* P G) = G + P* (m - P G)   outside the subspace: plain SGD
    v_i <- b2 v_i + (1 - b2) ||G_Psi_i||^2         one number a subset Psi_i of entries; v_i + ||G_Psi_i||^2 at b2 = 1
    s = lr sqrt(1 - b2^t) / (1 - b1^t)             or lr, without bias correction
    W <- W - s num / (sqrt(v) + eps);              W <- (1 - lr wd) W

||.||^2 is a sum over the subset, not a mean: lr is some sqrt(subset size) times Adam's (the authors use ten times).

Where this differs from the authors' code (the body of the paper was not at hand). A basis is new at 0-based t mod
tau = 0 and m is cleared first, as in their later releases; `compat="sn-sm"` is their first one: 1-based t mod tau = 0,
and m used once more, in coordinates of the old basis, before it is cleared. Bias correction also multiplies the part
outside the subspace (10 times at t = 1); `correct_complement=False` stops that. Their SRHT and approximate SVD are not
orthogonal projections; these are. A large G gets a randomized range finder, not an SVD (`proj_type="auto"`).
`moments="rotate"` carries m over as P_new P_old* m (ours). v is always float32. A gradient that is not finite, or
all zero, changes neither basis nor momentum at a refresh; `update` does not look, and the engine stops the run.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor

from .. import linalg
from ..clock import CLOCK, clock, tick
from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..linalg import projections
from ..moments import Moments, clocked, unbiased
from ..random import Key


def grouped(x: Tensor, subset: int | str) -> Tensor:
    """x as (runs, run length) under an integer rule: runs of the flattened tensor, each as long as the largest divisor
    of its size that is at most K, for K > 0, or sqrt(size)/q, for -q ("sqrt" is -1). Else x as it is."""
    if isinstance(subset, str) and subset != "sqrt":
        return x
    k = -1 if subset == "sqrt" else int(subset)
    return x.reshape(-1, linalg.largest_divisor(x.numel(), k if k > 0 else isqrt(x.numel()) // -k))


def sums(g: Tensor, subset: int | str) -> Tensor:
    """||G_Psi||^2, broadcastable against `grouped(g, subset)`. "heuristic" keeps an entry per index of the longer side:
    one a row where m >= n, one a column elsewhere; leading dimensions are a batch, a vector is a column of rows."""
    square = grouped(g, subset).square()
    if subset == "coordinate" or (subset == "heuristic" and g.ndim < 2):
        return square
    return square.sum(linalg.shorter(g) if subset == "heuristic" else -1, keepdim=True)


@dataclass(frozen=True)
class Snsm:
    """Settings of Subset-Norm and Subspace-Momentum."""

    rank: int | None = None
    """Dimension of the momentum's subspace; by default a quarter of the shorter side."""
    update_proj_gap: int = 200
    """Steps between two bases."""
    numerator: Literal["gradient", "ema", "subspace"] = "subspace"
    """What is divided: the gradient (also at b1 = 0), its average, or the average in a subspace and G outside."""
    second: Literal["none", "coordinate", "subset"] = "subset"
    """Second moments: none (also at b2 = 0), of every entry, of subsets. With a subspace, an entry of G near zero does
    not mean one of what is divided: there "coordinate" takes huge steps until it has seen some gradients. Warm up."""
    subset: int | Literal["heuristic", "sqrt"] = "heuristic"
    """Which entries share a step size: heuristic (a row or a column), sqrt, a size K, or -q for sqrt(size)/q."""
    proj_type: Literal["auto", "svd", "range", "random", "srht", "topk", "uniform"] = "auto"
    """On the shorter side svd, range (randomized), auto (one of the two, by size), random (orthonormal), srht; whole
    slices along the longer one topk (by norm), uniform."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """What is added to the root of the second moment."""
    correct_bias: bool = True
    """Correct the moments for their start at zero."""
    correct_complement: bool = True
    """Let bias correction also multiply the part of the gradient outside the subspace, as the authors do."""
    moments: Literal["reset", "keep", "rotate"] = "reset"
    """What a refresh does to the momentum; keep: its coordinates, now of another basis."""
    compat: Literal["", "sn-sm"] = ""
    """sn-sm: the authors' first release, to the letter."""

    def idle(self) -> set[str]:
        """Options that change nothing beside the others."""
        (b1, b2), subspace = self.betas, {"rank", "update_proj_gap", "proj_type", "moments", "compat"}
        inside = self.numerator == "subspace" and b1
        found = set() if inside else subspace
        found |= set() if inside and self.correct_bias else {"correct_complement"}
        found |= set() if self.second == "subset" and b2 else {"subset"}
        found |= (set() if b1 else {"numerator"}) | (set() if b2 else {"second"})
        return found | (set() if self.second != "none" and b2 else {"eps"})


def build(name: str, options: Snsm) -> Rule:
    """Slots: `exp_avg` (of the shape of P G), `exp_avg_sq`, those of `projections` and of `clock`.

    Raises UsageError for unknown options, and in `init` for a subspace of a 1-D tensor or of a rank above its shorter
    side.
    """
    rank, update_proj_gap, proj_type, moments = (
        options.rank,
        options.update_proj_gap,
        options.proj_type,
        options.moments,
    )
    numerator, second, compat = options.numerator, options.second, options.compat
    subset: int | str = options.subset
    betas, eps = options.betas, options.eps
    correct_bias, correct_complement = options.correct_bias, options.correct_complement
    b1, b2 = betas
    for option, got, known in (
        ("numerator", numerator, ("gradient", "ema", "subspace")),
        ("second", second, ("none", "coordinate", "subset")),
        ("subset", subset if isinstance(subset, str) else "int", ("heuristic", "sqrt", "int")),
        ("proj_type", proj_type, projections.KINDS),
        ("moments", moments, ("reset", "keep", "rotate")),
        ("compat", compat, ("", "sn-sm")),
    ):
        if got not in known:
            raise UsageError(f"{name}: {option} must be one of {known}, got {got!r}")
    if subset == 0:
        raise UsageError(f"{name}: a subset cannot have size 0; give a size K > 0, or -q for sqrt(size)/q")
    if correct_bias and b2 == 1:
        raise UsageError(f"{name}: betas[1] = 1 (AdaGrad's sum) needs correct_bias=False: sqrt(1 - 1^t) is 0")
    numerator, second = numerator if b1 else "gradient", second if b2 else "none"
    subset = subset if second == "subset" else "coordinate"
    subspace = numerator == "subspace"
    stale = subspace and compat == "sn-sm" and moments == "reset"
    apart = subspace and correct_bias and not correct_complement
    if subspace and update_proj_gap < 1:
        raise UsageError(f"{name}: update_proj_gap must be at least 1, got {update_proj_gap}")

    def rank_of(p: Tensor) -> int:
        return max(1, min(p.shape[-2:], default=0) // 4) if rank is None else rank

    def init(p: Tensor) -> Slots:
        slots, shape = clock(p), list(p.shape)
        if subspace:
            slots |= projections.blank(proj_type, p, rank_of(p))
            shape[projections.compressed(proj_type, p)] = rank_of(p)
        if stale:
            slots["stale"] = p.new_zeros(p.shape[:-2], dtype=torch.float32)
        if numerator != "gradient":
            slots["exp_avg"] = p.new_zeros(shape, dtype=torch.float32)
        if second != "none":
            slots["exp_avg_sq"] = torch.zeros_like(sums(p, subset), dtype=torch.float32)
        return slots

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        new, taken, ok = projections.renew(proj_type, g, slots, rank_of(g), key, only_missing)
        m, again = slots["exp_avg"], taken & ~projections.missing(slots)
        if stale:
            new["stale"] = again.float().view_as(slots["stale"])
        elif moments == "reset":
            new["exp_avg"] = torch.where(taken, 0, m)
        elif moments == "rotate":
            turned = projections.down(projections.up(m, slots, g), new)
            new["exp_avg"] = torch.where(taken, turned, m).contiguous()
        return slots | new, ok

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        g, lr, decay = g.float(), hyper["lr"], hyper["lr"] * hyper["weight_decay"]
        ticked, c1, c2 = tick(slots, betas)
        new, num = slots | ticked, g
        if numerator == "ema":
            num = new["exp_avg"] = slots["exp_avg"].lerp(g, 1 - b1)
        elif subspace:
            num, m = projections.average(g, slots["exp_avg"], 1 - b1, slots, 1 / c1 if apart else 1.0)
            new["exp_avg"] = m * (1 - slots["stale"][..., None, None]) if stale else m
        if stale:
            new["stale"] = torch.zeros_like(slots["stale"])
        s = lr * c2.sqrt() / (1.0 if apart else c1) if correct_bias else lr
        scale = (decay - 1) * s  # the decay is a factor too: a tensor of p's size used twice would have to be stored
        if second == "none":
            return scale * num - decay * p.float(), new
        w, v = sums(g, subset), slots["exp_avg_sq"]
        new["exp_avg_sq"] = v = v + w if b2 == 1 else b2 * v + (1 - b2) * w
        delta = grouped(num, subset) * (scale / (v.sqrt() + eps))
        return delta.reshape(p.shape) - decay * p.float(), new

    def export(slots: Slots, p: Tensor) -> Moments:
        m, v = slots.get("exp_avg"), slots.get("exp_avg_sq")
        if m is not None and subspace:
            m = projections.up(m, slots, p)
        if v is not None:
            mean = v * (v.numel() / p.numel()) / (slots["step"].clamp(min=1) if b2 == 1 else 1.0)
            v = mean.expand_as(grouped(p, subset)).reshape(p.shape)
        return unbiased(slots, m, v)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        scalars, c1, c2 = clocked(moments, betas, p)
        assert moments.first is not None and moments.second is not None
        new, did = slots | scalars, []
        if subspace:
            new |= projections.renew(proj_type, moments.first, slots, rank_of(p), key)[0]
            new["exp_avg"], did = projections.down(moments.first * c1, new).contiguous(), ["projected"]
        elif numerator == "ema":
            new["exp_avg"], did = moments.first * c1, ["kept"]
        if second != "none":
            total = sums(moments.second.sqrt(), subset)
            new["exp_avg_sq"] = total * (moments.seen[1] if b2 == 1 else c2)
            did.append("second moment kept" if subset == "coordinate" else "second moment summed into subsets")
        return new, ", ".join(did) or "dropped"

    declared = {} if numerator == "gradient" else {"exp_avg": Kind.FIRST}
    declared |= {} if second == "none" else {"exp_avg_sq": Kind.SECOND}
    if not subspace:
        slots, alone = (*CLOCK, *declare(**declared)), subset == "coordinate"
        return Rule(name, options, slots, init, update, export=export, adopt=adopt, elementwise=alone, betas=betas)
    declared |= projections.kinds(proj_type) | ({"stale": Kind.COUNTER} if stale else {})
    offset = update_proj_gap - 1 if compat == "sn-sm" else 0

    def built(slots: Slots) -> Tensor:
        return ~projections.missing(slots).any()

    slots = (*CLOCK, *declare(**declared))
    gap = update_proj_gap
    return Rule(name, options, slots, init, update, refresh, gap, offset, export, adopt, built, betas=betas)


# The paper's names; where they share a setting it is the default above.
snsm = Family("snsm", Snsm, build)
adam_sn = Family("adam_sn", Snsm, build, numerator="ema")
adagrad_sn = Family("adagrad_sn", Snsm, build, numerator="ema", betas=(0.9, 1.0), correct_bias=False)
rmsprop_sn = Family("rmsprop_sn", Snsm, build, numerator="gradient", betas=(0.0, 0.999), correct_bias=False)
adam_snsm = Family("adam_snsm", Snsm, build, proj_type="svd")
adagrad_snsm = Family("adagrad_snsm", Snsm, build, proj_type="svd", betas=(0.9, 1.0), correct_bias=False)
sgd_sm = Family("sgd_sm", Snsm, build, proj_type="svd", second="none", betas=(0.9, 0.0), correct_bias=False)
adam_sm = Family("adam_sm", Snsm, build, proj_type="svd", second="coordinate")
