"""Randomized subspace optimization (arXiv 2502.07222) in float64, in PyTorch's orientation: W (out, in), P (in, r).

(4a)  B~ = argmin_B f(W + B P^T) + 1/(2 eta) ||B||^2, from B = 0, by steps of an inner rule
(4b)  W <- W + B~ P^T, and a new P
(5)   y = x W^T + (x P) B^T
(6)   dB = dY^T (x P): of x nothing but x P is needed;  dx = dY (W + B P^T)
(7)   E[P P^T] = I;  for Haar and coordinates also P^T P = (in / r) I
(8)   a moment M of B in the next subspace (ours): M P_old^T P_new r / in
"""

from torch import Tensor


def forward(x: Tensor, w: Tensor, p: Tensor, b: Tensor) -> Tensor:
    """(5) of x (…, in): (…, out)."""
    x, w, p, b = (t.double() for t in (x, w, p, b))
    return x @ w.T + (x @ p) @ b.T


def gradient_of_b(x: Tensor, p: Tensor, dy: Tensor) -> Tensor:
    """(6), summed over everything but the last dimensions: (out, r)."""
    x, dy = (t.detach().double().flatten(0, -2) for t in (x, dy))
    return dy.T @ x @ p.double()


def gradient_of_x(w: Tensor, p: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    """(6)."""
    return dy.double() @ merged(w, p, b)


def merged(w: Tensor, p: Tensor, b: Tensor) -> Tensor:
    """(4b)."""
    return w.double() + b.double() @ p.double().T


def descend(b: Tensor, g: Tensor, lr: float, prox: float) -> Tensor:
    """A gradient step on (4a), `prox` = 1 / eta."""
    return b.double() - lr * (g.double() + prox * b.double())


def carried(m: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """(8) of a moment (out, r)."""
    size, rank = old.shape
    return m.double() @ old.double().T @ new.double() * rank / size
