"""The polar factor U V^T of X = U S V^T: the nearest matrix with orthonormal rows or columns, whichever are fewer.

Everything is computed in float64 and rounded once, because float32 loses kappa = cond(X) in it (an exact SVD in float32
is orthogonal, but off by 6e-8 kappa). With r the shorter side and S = X^T X (r, r), for X (n, r):

    lq             X = Q R (QR), R = U' S V^T, Q U' V^T          any kappa; null directions are completed arbitrarily
    svd            U V^T                                         the same, dearer
    gram           X V L^-1/2 V^T, S = V L V^T                   by far the cheapest here; see below
    polar_express  X <- X (a + b S + c S^2), some times          products only; null directions stay zero
    newton_schulz  the same with Muon's a, b, c, in float32      not exact: singular values end in about [0.7, 1.2]
    auto           gram on the CPU, polar_express elsewhere: an eigendecomposition waits for the device

S has kappa^2, of which float64 bears 1e8. Where there is more, gram first replaces X by X (S + 1e-8 |S|)^-1/2, which
has the same polar factor and kappa / 1e4; what is still too much, and what has no full rank, goes to lq.

polar_express has the coefficients of Amsel et al., "The Polar Express", arXiv 2505.16932, Algorithm 1, and iterates on
S (Zhang, Amsel, Chen & Dao, "Gram Newton-Schulz", 2026), so that X is touched at the start, at one restart and at the
end. Where this differs. The second triple, which keeps singular values within [0, 2] and multiplies small ones by 4.1,
is repeated until 1e-9 reaches 1. The restart comes after six steps, when the polynomial is still flat where S is but
rounding noise. Nothing is read on the host; and as the products are in float64, TF32 settings do not matter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..contract import UsageError
from ..device import free_to_read
from .bases import gram, tall, unit

LIMIT = 1e-8  # least eigenvalue of a Gram matrix over its largest for which float64 keeps eight digits of the former
LIFT = 1e-8

EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    *((4.107059111542203, -2.9478499167379106, 0.5448431082926601),) * 11,
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def polar(x: Tensor, method: str = "auto") -> Tensor:
    """The polar factor of x (..., m, n), float32; leading dimensions are a batch whose matrices stay apart.

    A zero matrix gives zeros, one that is not finite gives NaN. Within 1e-7 sqrt(r) of orthonormal, r = min(m, n), and
    of the float64 factor of the same matrix, at any condition number (polar_express: up to 1e8); except newton_schulz.
    The same numbers eagerly and compiled. Raises UsageError for an unknown method, and for what is not a matrix.
    """
    if method != "auto" and method not in METHODS:
        raise UsageError(f"polar: method must be one of {('auto', *METHODS)}, got {method!r}")
    if x.ndim < 2:
        raise UsageError(f"polar needs a matrix, got shape {tuple(x.shape)}; give this tensor to another rule")
    if method == "auto":
        method = "gram" if free_to_read(x) else "polar_express"
    o: Tensor = _polar(x, method)
    return o


@torch.library.custom_op("leanstep::polar", mutates_args=())
def _polar(x: Tensor, method: str) -> Tensor:
    """One operator, as `gram` branches on its data, and hundreds of small products are not worth compiling."""
    size = x.abs().amax((-2, -1), keepdim=True)
    usual = free_to_read(x) and bool(((size > 0) & size.isfinite()).all())  # then nothing is to be masked
    y = x if usual else torch.where(size.isfinite(), x, 0)
    y = (y if tall(y) else y.mT).reshape(-1, max(x.shape[-2:]), min(x.shape[-2:]))
    o = METHODS[method](y.float() if method == "newton_schulz" else y.double()).float()
    o = (o if tall(x) else o.mT).reshape(x.shape)
    return (o if usual else torch.where(size.isfinite(), torch.where(size > 0, o, 0), torch.nan)).contiguous()


@_polar.register_fake
def _(x: Tensor, method: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def by_svd(x: Tensor) -> Tensor:
    """x (b, n, r) float64, n >= r, and so below."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    o: Tensor = u @ vh
    return o


def by_lq(x: Tensor) -> Tensor:
    """The SVD of a square factor (LQ, as the moments that this is for are wide)."""
    q, r = torch.linalg.qr(x)
    o: Tensor = q @ by_svd(r)
    return o


def by_gram(x: Tensor, lifts: int = 1) -> Tensor:
    """An eigendecomposition of x^T x; only for the matrices of the batch that need it a second one, or `by_lq`."""
    l, v = torch.linalg.eigh(gram(x, 4))
    top = l[:, -1:]
    hard = ~(l[:, 0] > LIMIT * top[:, 0])
    shift = torch.where(hard.unsqueeze(-1), LIFT * top, 0)
    root = (l + shift).clamp(min=torch.finfo(l.dtype).tiny).rsqrt()
    root = (v * root.unsqueeze(-2)) @ v.mT
    o: Tensor = x @ root if x.is_contiguous() else (root @ x.mT).mT  # written as x is, which is how it will be read
    if hard.any():
        o[hard] = by_gram(o[hard], lifts - 1) if lifts else by_lq(x[hard])
    return o


def by_express(x: Tensor) -> Tensor:
    """Two Gram iterations from singular values at most 1; |S|_2 <= |S^2|_F^1/2, too large by r^1/4 at most."""
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-300)
    s = x.mT @ x
    x = x / (1.01 * torch.linalg.matrix_norm(s @ s, keepdim=True).pow(0.25)).clamp(min=1e-300)
    for coefficients in (EXPRESS[:6], EXPRESS[6:]):
        x = x @ composed(x.mT @ x, coefficients)
    return x


def composed(s: Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> Tensor:
    """The product of all a + b S_i + c S_i^2, S_i being S after the steps before i."""
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    factor = total = eye
    for i, (a, b, c) in enumerate(coefficients):
        if i:
            s = factor @ s @ factor
            s = (s + s.mT) / 2
        factor = a * eye + b * s + c * (s @ s)
        total = factor @ total if i else factor
    return total


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate polar factor of x (..., m, n) by Muon's quintic iteration, computed and returned in `dtype`.

    A tall x is multiplied from the right, where torch.optim.Muon transposes it, computes the same and transposes back:
    then the result lies as x does. (Read across, in bfloat16, by the kernel that rounds weights stochastically, it came
    out as NaN in places on AVX-512: torch 2.13's inductor.)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    across = x.shape[-2] > x.shape[-1]
    o = (x / unit(x)).to(dtype)  # exact: the norm of a matrix of any size neither overflows nor vanishes
    o = o / o.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape, o = o.shape, o.flatten(0, -3) if o.ndim > 2 else o
    fused = torch.baddbmm if o.ndim > 2 else torch.addmm  # one rounding for a sum and a product, as torch.optim.Muon
    for _ in range(steps):
        gram = o.mT @ o if across else o @ o.mT
        factor = fused(gram, gram, gram, beta=b, alpha=c)
        o = fused(o, o, factor, beta=a) if across else fused(o, factor, o, beta=a)
    return o.reshape(shape)


def by_newton_schulz(x: Tensor) -> Tensor:
    """x (b, n, r) float32."""
    return newton_schulz(x, dtype=torch.float32)


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": by_svd,
    "lq": by_lq,
    "gram": by_gram,
    "polar_express": by_express,
    "newton_schulz": by_newton_schulz,
}
