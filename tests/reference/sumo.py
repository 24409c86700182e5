"""SUMO (arXiv 2505.24749), Algorithm 1, in float64.

    (1)  Q_t, the leading left directions of G_t, every K steps;  R = Q_t^T Q_{t-1},  M <- R M
    (2)  G^ = Q^T G,  M_t = mu M_{t-1} + G^
    (3)  O = polar(M_t), by singular values;  with Nesterov O = polar(G^ + mu M_t)
    (4)  where ||O_t|| > gamma ||O_{t-1}||: O <- gamma ||O_{t-1}|| O / ||O||
    (5)  U = s Q O + rho (G - Q G^),  s = 0.2 sqrt(max(m, n))
    (6)  W <- W - eta alpha U - eta lambda W

On the rows of one matrix, W (m, n) and Q (m, r). Where columns are projected everything is passed transposed. The
release overwrites the state by Nesterov's look-ahead, M_t = mu^2 M_{t-1} + (1 + mu) G^, does not transfer M in (1), and
decays after the step.
"""

import numpy as np

Array = np.ndarray


def polar(x: Array) -> Array:
    """The nearest matrix with singular values of one."""
    u, _, vh = np.linalg.svd(x, full_matrices=False)
    return u @ vh


def first_delta(g: Array, w: Array, rank: int, lr: float, wd: float) -> Array:
    """What the first step adds to W, with exact directions: they are parallel to G's, so that its largest singular
    values become s and the others stay."""
    u, values, vh = np.linalg.svd(g, full_matrices=False)
    scaled = np.concatenate([np.full(rank, 0.2 * np.sqrt(max(w.shape))), values[rank:]])
    return -lr * u * scaled @ vh - lr * wd * w


class Sumo:
    """One matrix under (1) to (6), with the bases that it is given."""

    def __init__(
        self, w: Array, rank: int, *, nesterov="correct", moments="rotate", limiter=None, alpha="match", rho=1.0,
        perpendicular="raw", decay="before",
    ) -> None:  # fmt: skip
        self.w, self.q, self.m, self.norm = w, None, 0.0, 0.0
        self.nesterov, self.moments, self.limiter, self.rho = nesterov, moments, limiter, rho
        self.perpendicular, self.decay = perpendicular, decay
        self.alpha = np.sqrt(min(w.shape) / rank) if alpha == "match" else alpha

    def step(self, g: Array, q: Array, lr: float, wd: float, mu: float = 0.95) -> None:
        if self.q is not None and q is not self.q:  # (1)
            if self.moments == "rotate":
                self.m = q.T @ self.q @ self.m
            elif self.moments == "reset":
                self.m = 0.0
        self.q = q
        c = q.T @ g
        self.m = mu**2 * self.m + (1 + mu) * c if self.nesterov == "release" else mu * self.m + c  # (2)
        o = polar(c + mu * self.m if self.nesterov == "correct" else self.m)  # (3)
        if self.limiter:  # (4)
            norm = np.linalg.norm(o)
            if self.norm and norm > self.limiter * self.norm:
                o = o / norm * self.limiter * self.norm
            self.norm = np.linalg.norm(o)
        inside = 0.2 * np.sqrt(max(self.w.shape)) * q @ o  # (5)
        outside = g - q @ c
        if self.perpendicular == "normalized":
            outside = outside / np.linalg.norm(outside) * np.linalg.norm(inside)
        moved = self.w - lr * self.alpha * (inside + self.rho * outside)  # (6)
        self.w = moved - lr * wd * (self.w if self.decay == "before" else moved)
