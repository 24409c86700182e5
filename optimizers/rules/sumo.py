"""SUMO: Refael, Smorodinsky, Tirer & Lindenbaum, "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
Memory-Efficient LLM Training", NeurIPS 2025, arXiv 2505.24749, Algorithm 1.

    every K steps   Q <- leading r left singular directions of G (randomized SVD)     (Q^T Q = I)
                    M <- R M,  R = Q^T Q_old                                          moment transfer
    Ĝ = Q^T G                                                                         (or G Q, then M <- M R^T)
    M <- mu M + Ĝ
    O = U V^T,  M = U S V^T                                                           the exact polar factor
    O <- gamma ||O_old|| / ||O|| O  where ||O|| > gamma ||O_old||                     limiter
    W <- W - eta alpha (rho (G - Q Ĝ) + s Q O) - eta lambda W,   s = 0.2 sqrt(max(m, n))

The paper prints neither mu, alpha, rho nor s; its text scales by sqrt(max(m, n)) after Liu et al., arXiv 2502.16982.
mu = 0.95, s and alpha (its "projection back scale", 4 at rank 4 and 2 at rank 8) are those of the released code.

Where this differs. The shorter side is projected, as in the released code; `side="longer"` is the side that the paper
prints. `sumo_paper` is the algorithm above, `sumo_release` that code: an exact SVD, coordinates of the old basis kept
in the new one, alpha = 4, a Nesterov step that is written back into M, which makes its decay mu^2, and weight decay
after the step. That code refreshes where its 1-based step count is a multiple of K; here it is the 0-based one for all.

`sumo` is what we recommend. Its Q is drawn at random away from the old one, so that in n / r gaps the moment has been
everywhere: on text this learned more than the leading directions of G, which hold most of G and little of what is to be
learned (docs/results; of SGD: Song, Ahn & Yun, arXiv 2405.16002). `basis="range"` is those. The step X = Ĝ + mu M
is orthogonalised in M's place and not written back, and alpha = sqrt(min(m, n) / r) gives s Q O the RMS 0.2 of a
full-rank update. It has no limiter: where O is exact ||O|| is sqrt(r) always. With `refresh_below` a basis is rebuilt
when ||Ĝ|| falls to that bound (the theory's criterion) instead of every K steps. A zero moment moves nothing; null
directions of any other are completed as `polar` says. A matrix whose gradient is not finite keeps basis and moment at a
refresh, and `update` takes it for zero; the engine stops the run.

Ours too: `basis="track"` multiplies the old basis by G G^T once, which is cheap enough for a small K;
`perpendicular="normalized"` gives G - Q Ĝ, whatever its size, rho times the Frobenius norm of s Q O, "orthogonal" makes
it s rho times its factor by Muon's iteration: as SUMO in memory, as Muon in time.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from .. import linalg
from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..device import free_to_read
from ..linalg.polar import METHODS, newton_schulz, polar
from ..moments import Moments
from ..random import Key, normal

MATRIX = (-2, -1)


@dataclass(frozen=True)
class Sumo:
    """SUMO's settings; the defaults are the recommended ones."""

    rank: int = 128
    """Dimension of the subspace."""
    update_proj_gap: int = 200
    """Steps between two bases."""
    momentum: float = 0.95
    """Decay of the sum of projected gradients."""
    nesterov: Literal["correct", "none", "release"] = "correct"
    """none: heavy ball, as printed; release: the step of the released code, which is written back."""
    basis: Literal["random", "range", "svd", "track"] = "random"
    """random (away from the old one), the leading directions of G (range: randomized, 2 r directions, 2 power
    iterations; svd), track (one subspace iteration from the old basis; at first, a random one)."""
    moments: Literal["rotate", "keep", "reset"] = "rotate"
    """What a refresh does to M; keep: its coordinates, now of another basis."""
    side: Literal["shorter", "longer"] = "shorter"
    """Which side of a matrix is projected."""
    refresh_below: float | None = None
    """Rebuild the basis when the projected gradient's norm falls to this, instead of every so many steps."""
    limiter: float | None = None
    """Most by which the norm of an update may grow from one step to the next."""
    rms: float = 0.2
    """Root mean square of a full-rank update."""
    alpha: float | Literal["match"] = "match"
    """What the whole update is multiplied by; match: sqrt(short side / rank)."""
    rho: float = 1.0
    """Weight of the gradient outside the subspace."""
    perpendicular: Literal["raw", "normalized", "orthogonal"] = "raw"
    """That part as it is, of the size of the part inside, or orthogonalised by Muon's iteration."""
    orthogonalize: Literal["auto", "svd", "lq", "gram", "polar_express", "newton_schulz"] = "auto"
    """How the polar factor is computed."""
    decay: Literal["before", "after"] = "before"
    """Weight decay before the step, as Algorithm 1 has it, or after it: then the step decays too."""

    def idle(self) -> set[str]:
        """Options that change nothing beside the others."""
        return (set() if self.refresh_below is None else {"update_proj_gap"}) | (
            set() if self.rho else {"perpendicular"}
        )


def build(name: str, options: Sumo) -> Rule:
    """Slots, float32: `basis` (short, r), `momentum_buffer` (m, r) or (r, n), so (m + n) r numbers; with a limiter also
    `norm`, a number a matrix.

    Raises UsageError for options it does not know, and in `init` for a rank above the shorter side and for 1-D tensors.
    Leading dimensions are a batch of matrices that do not affect each other.
    """
    rank, update_proj_gap, momentum, nesterov = (
        options.rank,
        options.update_proj_gap,
        options.momentum,
        options.nesterov,
    )
    basis, moments, side, refresh_below = options.basis, options.moments, options.side, options.refresh_below
    limiter, rms, alpha, rho = options.limiter, options.rms, options.alpha, options.rho
    perpendicular, orthogonalize, decay = options.perpendicular, options.orthogonalize, options.decay
    for option, got, known in (
        ("nesterov", nesterov, ("correct", "none", "release")),
        ("basis", basis, ("range", "svd", "track", "random")),
        ("moments", moments, ("rotate", "keep", "reset")),
        ("side", side, ("shorter", "longer")),
        ("perpendicular", perpendicular, ("raw", "normalized", "orthogonal")),
        ("orthogonalize", orthogonalize, ("auto", *METHODS)),
        ("decay", decay, ("before", "after")),
        ("alpha", alpha if isinstance(alpha, str) else "match", ("match",)),
    ):
        if got not in known:
            raise UsageError(f"{name}: {option} must be one of {known}, got {got!r}")
    if update_proj_gap < 1:
        raise UsageError(f"{name}: update_proj_gap must be at least 1, got {update_proj_gap}")
    if not 0 <= momentum < 1:
        raise UsageError(f"{name}: momentum must lie in [0, 1), got {momentum}")
    other = side == "longer"

    def init(p: Tensor) -> Slots:
        linalg.check_rank(p, rank)
        shape = list(p.shape)
        shape[linalg.longer(p) if other else linalg.shorter(p)] = rank
        m, norm = (p.new_zeros(size, dtype=torch.float32) for size in (shape, p.shape[:-2]))
        slots = {"basis": linalg.no_basis(p, rank, other), "momentum_buffer": m}
        return slots | {"norm": norm} if limiter else slots

    def leading(g: Tensor, key: Key) -> Tensor:
        q = linalg.svd_basis(g, rank) if basis == "svd" else linalg.range_basis(g, rank, key, oversample=rank, power=2)
        if not other:
            return q
        images = linalg.project(g, q)  # of the leading directions of one side: those of the other
        across: Tensor = torch.linalg.qr(images if linalg.tall(g) else images.mT)[0]
        return across

    def drawn(x: Tensor, old: Tensor, key: Key) -> Tensor:
        if basis == "random":
            return linalg.new_basis(old, key)
        if basis == "track":
            x = x if linalg.tall(x) != other else x.mT
            start = torch.where(linalg.missing(old), normal(key, tuple(old.shape[-2:]), x.device), old)
            tracked: Tensor = torch.linalg.qr(x.mT @ (x @ start))[0]
            return tracked
        return leading(x, key)

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        old, m, (x, wanted) = slots["basis"], slots["momentum_buffer"], linalg.directions(g)
        missing = linalg.missing(old)
        if only_missing:
            wanted = wanted & missing
        elif refresh_below is not None:
            seen = linalg.project(torch.where(wanted, g, 0).float(), old, other).double().norm(dim=MATRIX, keepdim=True)
            wanted = wanted & ((seen <= refresh_below) | missing)
            if free_to_read(wanted) and not wanted.any():  # elsewhere a basis is drawn that `where` does not take
                return slots, linalg.rebuilt(g, wanted, wanted)
        still = m.abs().amax(MATRIX, keepdim=True) == 0  # nothing was learned in the old one: no need to stay away
        new = drawn(x, torch.where(still, 0, old), key)
        taken = wanted & linalg.finite(new)
        q = torch.where(taken, new, old).contiguous()
        if moments == "rotate":
            m = torch.where(taken, linalg.rotate(m, q.mT @ old, g, other), m)
        elif moments == "reset":
            m = torch.where(taken, 0, m)
        return slots | {"basis": q, "momentum_buffer": m.contiguous()}, linalg.rebuilt(g, wanted, taken)

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        g, q, m = g.float(), slots["basis"], slots["momentum_buffer"]
        c = linalg.project(g, q, other)
        finite = c.abs().amax(MATRIX, keepdim=True).isfinite()
        c, g = torch.where(finite, c, 0), torch.where(finite, g, 0)
        for _ in range(2 if nesterov == "release" else 1):
            m = momentum * m + c
        o = polar(c + momentum * m if nesterov == "correct" else m, orthogonalize)
        new = slots | {"momentum_buffer": m}
        if limiter:
            norm, bound = o.square().sum(MATRIX).sqrt(), limiter * slots["norm"]
            shrink = torch.where((bound > 0) & (norm > bound), bound / norm, 1)
            o, new["norm"] = o * shrink[..., None, None], norm * shrink
        s = rms * sqrt(max(p.shape[-2:]))
        weight: float | Tensor = rho
        if perpendicular == "normalized":
            unit = linalg.unit(g)
            whole, inside = ((x / unit).square().sum(MATRIX, keepdim=True) for x in (g, c))
            outside = whole - inside  # below a millionth of the whole it is rounding
            weight = torch.where(outside > 1e-6 * whole, rho * s * sqrt(rank) * outside.rsqrt() / unit, 0)
        elif perpendicular == "orthogonal":
            g, c = s * newton_schulz(g - linalg.lift(c, q, p, other)).float(), torch.zeros_like(c)
        step = hyper["lr"] * (sqrt(min(p.shape[-2:]) / rank) if isinstance(alpha, str) else alpha)
        inner = linalg.lift(weight * c - s * o, q, p, other)  # subtracted: a sum would become addmm, which copies g
        u = weight * g - inner if rho else -inner
        shrink = hyper["lr"] * hyper["weight_decay"]
        if decay == "after":
            step = step * (1 - shrink)
        return -step * u - shrink * p.float(), new

    def export(slots: Slots, p: Tensor) -> Moments:
        first = (1 - momentum) * linalg.lift(slots["momentum_buffer"], slots["basis"], p, other)
        return Moments(first, None, (1 / (1 - momentum), 0.0))

    def adopt(given: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert given.first is not None
        x, good = linalg.directions(given.first)
        q = leading(x, key)  # of what was learned, whatever comes at the next refresh
        q = torch.where(good & linalg.finite(q), q, slots["basis"]).contiguous()
        m = linalg.project(given.first, q, other) / (1 - momentum)
        return slots | {"basis": q, "momentum_buffer": m.contiguous()}, "projected"

    def built(slots: Slots) -> Tensor:
        return ~linalg.missing(slots["basis"]).any()

    gap = update_proj_gap if refresh_below is None else 1
    slots = declare(basis=Kind.BASIS, momentum_buffer=Kind.FIRST) + (declare(norm=Kind.COUNTER) if limiter else ())
    return Rule(name, options, slots, init, update, refresh, gap, 0, export, adopt, built)


sumo = Family("sumo", Sumo, build)
sumo_paper = Family("sumo_paper", Sumo, build, nesterov="none", basis="range", limiter=1.1, alpha=1.0)
sumo_release = Family(
    "sumo_release",
    Sumo,
    build,
    nesterov="release",
    basis="svd",
    moments="keep",
    limiter=1.1,
    alpha=4.0,
    decay="after",
)
