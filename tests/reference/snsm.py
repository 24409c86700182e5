"""Subset-Norm and Subspace-Momentum (arXiv 2411.07120) in float64: every optimizer of the paper is one template.

    (1)  w_t   = ||G_Psi||^2 at every entry, Psi the entry's subset: a sum, not a mean
    (2)  v_t   = b2 v_{t-1} + (1 - b2) w_t;  b2 = 1 sums up over time;  coordinates instead of subsets: w = G^2
    (3)  C_t   = P G_t,  m_t = b1 m_{t-1} + (1 - b1) C_t
    (4)  num_t = P* m_t + (G_t - P* C_t)
    (5)  s_t   = lr sqrt(1 - b2^t) / (1 - b1^t), or lr without bias correction
    (6)  W    <- W - s_t num_t / (sqrt(v_t) + eps);  then W <- W - lr wd W

P has orthonormal rows. A refresh replaces it and clears m, keeps its coordinates, or (ours) rotates them. In the
authors' first release (`stale`) the first step after a refresh still uses the old coordinates, and then forgets them.
"""

import numpy as np

Array = np.ndarray


def projection(slots: dict[str, Array], shape: tuple[int, int]) -> tuple[Array, bool]:
    """(P as a matrix with orthonormal rows, whether it acts on the columns of W) from what is kept of it: a `basis` of
    the shorter side; or an `index` of slices of the longer side; or, with `signs`, rows of a Hadamard transform."""
    m, n = shape
    if "basis" in slots:
        return slots["basis"].astype(np.float64).T, m >= n
    if "signs" not in slots:
        return np.eye(max(m, n))[slots["index"]], m < n
    h = np.ones((1, 1))
    while len(h) < min(m, n):
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
    return h[slots["index"]] * slots["signs"], m >= n


def subset_sums(g: Array, subset: int | str) -> Array:
    """(1). "heuristic": a row where m >= n, else a column; "sqrt", k or -q: contiguous runs of the largest divisor of
    the size that is at most sqrt(size), k or sqrt(size) / q."""
    if subset == "heuristic":
        return np.broadcast_to((g**2).sum(1 if g.shape[0] >= g.shape[1] else 0, keepdims=True), g.shape)
    bound = np.sqrt(g.size) if subset == "sqrt" else subset if subset > 0 else np.sqrt(g.size) / -subset
    k = max(d for d in range(1, g.size + 1) if g.size % d == 0 and d <= max(1, bound))
    return np.repeat((g.reshape(-1, k) ** 2).sum(1), k).reshape(g.shape)


class Snsm:
    """One matrix under (1) to (6). `complement=False` (ours): the bias of b1 is corrected in the subspace alone."""

    def __init__(self, p: Array, *, b1, b2, eps, bias, complement, second, subset, moments, stale) -> None:
        self.p, self.t, self.v, self.m = p.astype(np.float64), 0, 0.0, None
        self.b1, self.b2, self.eps, self.bias, self.complement = b1, b2, eps, bias, complement
        self.second, self.subset, self.moments, self.stale = second, subset, moments, stale
        self.projection = None

    def step(self, g: Array, slots: dict[str, Array], due: bool, lr: float, wd: float) -> None:
        """With the P that `slots` hold, which is a new one where `due`."""
        g = g.astype(np.float64)
        self.t += 1
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        gain, s = 1.0, lr
        if self.bias:  # (5)
            s = lr * np.sqrt(c2) / c1
            if not self.complement:
                gain, s = 1 / c1, lr * np.sqrt(c2)
        matrix, columns = projection(slots, self.p.shape)
        down = (lambda x: x @ matrix.T) if columns else (lambda x: matrix @ x)
        up = (lambda c: c @ matrix) if columns else (lambda c: matrix.T @ c)
        c = down(g)  # (3)
        old = np.zeros_like(c) if self.m is None else self.m
        renewed = due and self.t > 1
        if renewed and self.moments == "rotate":
            before = self.projection
            old = down(old @ before if columns else before.T @ old)
        elif renewed and self.moments == "reset" and not self.stale:
            old = np.zeros_like(c)
        used = self.b1 * old + (1 - self.b1) * c
        self.m = np.zeros_like(c) if renewed and self.stale and self.moments == "reset" else used
        self.projection = matrix
        u = gain * up(used) + g - up(c)  # (4)
        if self.second != "none":
            w = g**2 if self.second == "coordinate" else subset_sums(g, self.subset)  # (1)
            self.v = self.v + w if self.b2 == 1 else self.b2 * self.v + (1 - self.b2) * w  # (2)
            u = u / (np.sqrt(self.v) + self.eps)
        self.p = (1 - lr * wd) * (self.p - s * u)  # (6)


class Picked:
    """The first release with slices of the largest norms, in the order of their norms: after a refresh the
    coordinates of old slices are used by their position, once, or for good where `overlap`."""

    def __init__(self, w: Array, rank: int, gap: int, *, overlap: bool, b1=0.9, b2=0.999, eps=1e-6) -> None:
        self.w, self.rank, self.gap, self.overlap = w.astype(np.float64), rank, gap, overlap
        self.b1, self.b2, self.eps = b1, b2, eps
        self.tall = w.shape[0] >= w.shape[1]
        self.m, self.v, self.t = np.zeros((rank, min(w.shape))), np.zeros(max(w.shape)), 0
        self.index = None

    def step(self, g: Array, lr: float) -> None:
        self.t += 1
        d = g.astype(np.float64) if self.tall else g.astype(np.float64).T  # slices are rows
        renewed = self.t == 1 or self.t % self.gap == 0
        if renewed:
            self.index = np.argsort(-np.linalg.norm(d, axis=1))[: self.rank]
        used = self.b1 * self.m + (1 - self.b1) * d[self.index]  # (3)
        forgets = renewed and self.t > 1 and not self.overlap
        self.m = np.zeros_like(used) if forgets else used
        u = d.copy()
        u[self.index] = used  # (4)
        self.v = self.b2 * self.v + (1 - self.b2) * (d**2).sum(1)  # (1), (2)
        u = u / (np.sqrt(self.v)[:, None] + self.eps)
        u = u * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)  # (5)
        self.w = self.w - lr * (u if self.tall else u.T)  # (6)
