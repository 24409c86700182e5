"""The baselines in float64: AdamW (arXiv 1711.05101), GaLore (arXiv 2403.03507) and SCALE (arXiv 2506.16659). Muon and
SGD: see torch.optim.

(1)  m_t = b1 m_{t-1} + (1 - b1) g,  v_t = b2 v_{t-1} + (1 - b2) g^2
(2)  AdamW: w <- (1 - lr wd) w - lr m^ / (sqrt(v^) + eps),  m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)
(3)  GaLore: C = G Q or Q^T G, of the shorter side, takes g's place in (1); N = m / (sqrt(v) + eps) times
     sqrt(1 - b2^t) / (1 - b1^t), lifted back by Q;  W <- W - lr scale N;  then W <- W - lr wd W
(4)  at a refresh: moments kept, cleared with their count of steps, or (ours) rotated, m by R = Q_new^T Q_old and v
     by R^2
(5)  SCALE: M_t = mu M_{t-1} + (1 - mu) G;  w <- (1 - lr wd) w - lr M_ij / sqrt(mean_j M_ij^2), or the mean over i
"""

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


class AdamW:
    """(1) and (2) of one tensor."""

    def __init__(self, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        self.b1, self.b2, self.eps = b1, b2, eps
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, w: Tensor, g: Tensor, lr: float, wd: float) -> Tensor:
        """The next w, in float64."""
        g, self.t = g.double(), self.t + 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return w.double() * (1 - lr * wd) - lr * m / (torch.sqrt(v) + self.eps)


class Galore:
    """(1), (3) and (4) of one matrix, with the bases that it is given."""

    def __init__(self, w: Array, rank: int, scale: float, b1: float, b2: float, eps: float, moments: str) -> None:
        self.w, self.tall = w.astype(np.float64), w.shape[0] >= w.shape[1]
        self.rank, self.scale, self.b1, self.b2, self.eps, self.moments = rank, scale, b1, b2, eps, moments
        self.m = self.v = np.zeros((w.shape[0], rank) if self.tall else (rank, w.shape[1]))
        self.q, self.t = None, 0

    def leading(self, g: Array) -> Array:
        """The exact directions of the shorter side."""
        u, _, vh = np.linalg.svd(g.astype(np.float64), full_matrices=False)
        return vh[: self.rank].T if self.tall else u[:, : self.rank]

    def refresh(self, q: Array) -> None:
        """(4)."""
        old, self.q = self.q, q.astype(np.float64)
        if old is not None and self.moments == "reset":
            self.m, self.v, self.t = np.zeros_like(self.m), np.zeros_like(self.v), 0
        elif old is not None and self.moments == "rotate":
            r = self.q.T @ old
            self.m, self.v = (self.m @ r.T, self.v @ (r**2).T) if self.tall else (r @ self.m, r**2 @ self.v)

    def step(self, g: Array, lr: float, wd: float) -> None:
        d, self.t = g.astype(np.float64), self.t + 1
        c = d @ self.q if self.tall else self.q.T @ d
        self.m = self.b1 * self.m + (1 - self.b1) * c
        self.v = self.b2 * self.v + (1 - self.b2) * c**2
        n = self.m / (np.sqrt(self.v) + self.eps) * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        w = self.w - lr * self.scale * (n @ self.q.T if self.tall else self.q @ n)
        self.w = w - lr * wd * w


class Scale:
    """(5) of one matrix (out, in); `axis` is that over which an average is taken."""

    def __init__(self, w: Array, momentum: float, axis: int) -> None:
        self.w, self.momentum, self.axis = w.astype(np.float64), momentum, axis
        self.m = np.zeros_like(self.w)

    def step(self, g: Array, lr: float, wd: float) -> None:
        self.m = self.momentum * self.m + (1 - self.momentum) * g.astype(np.float64)
        size = np.sqrt(np.mean(self.m**2, axis=self.axis, keepdims=True))
        self.w = self.w - lr * (self.m / size + wd * self.w)
