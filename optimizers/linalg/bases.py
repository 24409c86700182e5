"""Linear algebra that rules share. The last two dimensions are the matrix; leading ones (expert stacks) are a batch.

Which side is projected is decided here and nowhere else: the *shorter* one (GaLore's `proj_type="std"`), the column
side of a square matrix. A basis is (..., short, r) with orthonormal columns, so it always costs short * r:

    m >= n:  C = G Q    (m, r)    G ~ C Q^T            m < n:  C = Q^T G    (r, n)    G ~ Q C

`other=True` projects the longer side instead, with a basis (..., long, r).
"""

from math import isqrt, pi, sqrt

import torch
from torch import Tensor

from ..contract import UsageError
from ..random import Key, normal


def tall(x: Tensor) -> bool:
    """True where the columns are projected: at least as many rows as columns."""
    return x.shape[-2] >= x.shape[-1]


def shorter(x: Tensor) -> int:
    """The dimension, -1 or -2, of x's shorter side: the one that is projected."""
    return -1 if tall(x) else -2


def longer(x: Tensor) -> int:
    """The other one."""
    return -2 if tall(x) else -1


def project(g: Tensor, basis: Tensor, other: bool = False) -> Tensor:
    """Coordinates of g (..., m, n) in the basis: (..., m, r) or (..., r, n)."""
    return g @ basis if tall(g) != other else basis.mT @ g


def lift(c: Tensor, basis: Tensor, like: Tensor, other: bool = False) -> Tensor:
    """The matrix whose coordinates are c; `like` has the full shape and decides the side."""
    return c @ basis.mT if tall(like) != other else basis @ c


def rotate(c: Tensor, rotation: Tensor, like: Tensor, other: bool = False) -> Tensor:
    """Coordinates after a change of basis, `rotation` = Q_new^T Q_old (..., r, r)."""
    return c @ rotation.mT if tall(like) != other else rotation @ c


def check_rank(p: Tensor, rank: int) -> None:
    """Raises UsageError unless p is at least a matrix and 1 <= rank <= its shorter side."""
    if p.ndim < 2:
        raise UsageError(
            f"a subspace rule needs a matrix, got shape {tuple(p.shape)}; give this tensor to another rule"
        )
    if not 1 <= rank <= min(p.shape[-2:]):
        raise UsageError(
            f"rank must lie in [1, {min(p.shape[-2:])}] for shape {tuple(p.shape)}, got {rank}; "
            "lower the rank or give this tensor to another rule"
        )


def no_basis(p: Tensor, rank: int, other: bool = False) -> Tensor:
    """What stands for a basis until a gradient was seen that gives one: zeros, float32, in which nothing moves."""
    return p.new_zeros(*p.shape[:-2], p.shape[longer(p) if other else shorter(p)], rank, dtype=torch.float32)


def unit(x: Tensor) -> Tensor:
    """The power of two below the largest entry of each matrix of x (..., m, n): (..., 1, 1) float32, never zero.

    What is divided by it is rounded nowhere, and neither its squares nor their sums overflow or vanish, so that
    directions do not depend on how large a gradient is. Infinite, or NaN, where x is.
    """
    largest = x.abs().amax((-2, -1), keepdim=True).float()
    return (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)


def svd_basis(g: Tensor, rank: int) -> Tensor:
    """The leading r singular directions of g on its shorter side, exact, float32. Raises on non-finite g."""
    u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
    basis: Tensor = vh[..., :rank, :].mT if tall(g) else u[..., :rank]
    return basis.contiguous()


def range_basis(g: Tensor, rank: int, key: Key, oversample: int | None = None, power: int = 1) -> Tensor:
    """The same directions from a randomized range finder (Halko, Martinsson & Tropp 2011): a Gaussian sketch of
    r + oversample directions of the short side, 1 + `power` times through S = G^T G (or G G^T), the best r kept.

    S itself is formed where that is cheaper than passes over G. Dropping the extra directions takes an eigenproblem of
    their number, for which one more iteration gains more at a large rank, so `oversample` is 8 up to rank 64, else 0.
    The size of g does not matter. Not finite where g is not.
    """
    x = g.float() / unit(g)
    x = x if tall(g) else x.mT
    long, short = x.shape[-2:]
    size = min(rank + (8 if rank <= 64 else 0) if oversample is None else rank + oversample, short)
    times = 1 + power
    s = gram(x) if long * short + 2 * times * short * size < 4 * times * long * size else None
    y = normal(key, (short, size), x.device).expand(*x.shape[:-2], short, size)
    for i in range(times):
        y = torch.linalg.qr(y)[0] if i else y
        y = s @ y if s is not None else x.mT @ (x @ y)
    q: Tensor
    q, r = torch.linalg.qr(y)
    if size > rank:
        r = r.double().nan_to_num(0, 0, 0)
        directions = torch.linalg.eigh(r @ r.mT)[1].flip(-1)[..., :rank]
        q = q @ directions.float()
    return q.contiguous()


def gram(x: Tensor, blocks: int = 8) -> Tensor:
    """x^T x (..., n, n), by blocks of columns: little more than half the work of the plain product."""
    n = x.shape[-1]
    width = -(-n // blocks)
    s = x.new_empty((*x.shape[:-2], n, n))
    for i in range(0, n, width):
        strip = x[..., i : i + width].mT @ x[..., i:]
        s[..., i : i + width, i:] = strip
        s[..., i:, i : i + width] = strip.mT
    return s


def random_basis(p: Tensor, rank: int, key: Key) -> Tensor:
    """Orthonormal directions of the shorter side, uniform (Haar), the same for every matrix of a batch."""
    q: Tensor = torch.linalg.qr(normal(key, (min(p.shape[-2:]), rank), p.device))[0]
    return q.expand(*p.shape[:-2], *q.shape).contiguous()


def new_basis(old: Tensor, key: Key) -> Tensor:
    """Random orthonormal directions away from those of `old` (..., side, r), as far as there are others; a zero `old`
    leaves them free. Within a batch each matrix stays away from its own."""
    y = normal(key, tuple(old.shape[-2:]), old.device)
    q: Tensor = torch.linalg.qr(y - (1 - 1e-4) * old @ (old.mT @ y))[0]  # a trace remains: all may be needed
    return q.contiguous()


def directions(g: Tensor) -> tuple[Tensor, Tensor]:
    """(g in float32, each matrix divided by its `unit`, or zeros where it says nothing; where it does: finite, and not
    all zero, (..., 1, 1) bool)."""
    largest = g.abs().amax((-2, -1), keepdim=True)
    good = largest.isfinite() & (largest > 0)
    x = torch.where(good, g, 0).float()
    return x / unit(x), good


def missing(basis: Tensor) -> Tensor:
    """Where there is no basis yet, only `no_basis`: (..., 1, 1) bool for (..., side, r)."""
    return (basis == 0).all(-1, keepdim=True).all(-2, keepdim=True)


def finite(x: Tensor) -> Tensor:
    """Which matrices of x (..., m, n) have no infinite and no NaN entry: (..., 1, 1) bool."""
    return x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def rebuilt(g: Tensor, wanted: Tensor, taken: Tensor) -> Tensor:
    """0-d bool, the `ok` of a refresh: every entry of g is finite, one is not zero, and every matrix that was `wanted`,
    as its gradient allowed it, was `taken`."""
    largest = g.abs().amax()
    return largest.isfinite() & (largest > 0) & (taken | ~wanted).all()


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows (dim -2) or columns (dim -1) of x (..., m, n). `index` (..., r) may lack the leading dimensions."""
    shape = list(x.shape)
    shape[dim] = index.shape[-1]
    return x.gather(dim, index.unsqueeze(-3 - dim).expand(shape))


def spread(c: Tensor, index: Tensor, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(c with its r slices at `index` along `dim` of `like`'s shape and anything elsewhere, where they are).

    A gather, which a compiler fuses with what follows; a scatter would need a buffer of `like`'s size.
    """
    order = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    slot = index.new_full((*index.shape[:-1], like.shape[dim]), -1).scatter(-1, index, order)
    return take(c, slot.clamp(min=0), dim), slot.unsqueeze(-3 - dim) >= 0


def largest_divisor(n: int, bound: int) -> int:
    """The largest divisor of n that is at most max(1, bound)."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return max(d for q in small for d in (q, n // q) if d <= max(1, bound))


def flat(n: int, device: torch.device) -> Tensor:
    """A symmetric orthogonal n x n matrix whose entries are at most sqrt(2/n): Sylvester's Hadamard matrix where n is
    a power of two, else its Kronecker product with the Hartley matrix (cos + sin) of n's odd part."""
    odd = n
    while odd % 2 == 0:
        odd //= 2
    i = torch.arange(n, device=device)
    bits = (i // odd).unsqueeze(1) & (i // odd)
    for shift in (8, 4, 2, 1):  # the parity of the common bits
        bits = bits ^ (bits >> shift)
    h = (1 - 2 * (bits & 1)).double()
    if odd > 1:
        angle = ((i % odd).unsqueeze(1) * (i % odd) % odd).double() * (2 * pi / odd)
        h = h * (angle.cos() + angle.sin())
    return (h / sqrt(n)).float()


def transform(x: Tensor, dim: int) -> Tensor:
    """flat(a) (x) flat(b) applied along dim -2 or -1, of size a b with a the largest divisor up to its square root.

    A fast Walsh-Hadamard transform in two products where that is a power of two; orthonormal and its own inverse at
    every size, for which zero-padding to a power of two would not do: what is left of the rows is not orthogonal.
    """
    *batch, m, n = x.shape
    a = largest_divisor(x.shape[dim], isqrt(x.shape[dim]))
    b = x.shape[dim] // a
    left, right = flat(a, x.device), flat(b, x.device)
    if dim == -1:
        return (left @ (x.reshape(-1, b) @ right).view(-1, a, b)).view(x.shape)
    x = (left @ x.reshape(*batch, a, b * n)).view(*batch, a, b, n)
    return (right @ x).view(*batch, m, n)


def mix(x: Tensor, signs: Tensor) -> Tensor:
    """The shorter side of x with its signs flipped, then transformed. `signs` (short,)."""
    return transform(x * (signs if tall(x) else signs.unsqueeze(-1)), shorter(x))


def unmix(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `mix`."""
    return transform(x, shorter(x)) * (signs if tall(x) else signs.unsqueeze(-1))
