"""Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    B <- mu B + (1 - mu) G                 N = (1 - mu) G + mu B  if nesterov else  B
    O = NewtonSchulz5(N)  ~ U V^T of N     W <- (1 - lr wd) W - lr s O

Equal to torch.optim.Muon, in its defaults and both its scales: `original` s = sqrt(max(1, m/n)), and
`match_rms_adamw` s = 0.2 sqrt(max(m, n)) (Liu et al., arXiv 2502.16982), under which AdamW's lr and decay carry over.
The iteration does not converge to U V^T: singular values end in about [0.7, 1.2], by design.

Where this differs. `orthogonalize="exact"` takes U V^T itself, at the cost of an eigendecomposition.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..linalg.polar import newton_schulz as newton_schulz
from ..linalg.polar import polar
from ..moments import Moments
from ..random import Key


@dataclass(frozen=True)
class Muon:
    """Muon's settings."""

    momentum: float = 0.95
    """Decay of the average gradient."""
    nesterov: bool = True
    """Orthogonalise the gradient and the momentum together."""
    steps: int = 5
    """Of the Newton-Schulz iteration."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Scale of an update; match_rms_adamw lets AdamW's learning rates carry over."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the iteration computes in."""
    orthogonalize: Literal["newton_schulz", "exact"] = "newton_schulz"
    """Muon's iteration, or U V^T itself."""

    def idle(self) -> set[str]:
        """Options that change nothing beside the others."""
        return {"steps", "dtype"} if self.orthogonalize == "exact" else set()


def build(name: str, options: Muon) -> Rule:
    """Slots: `momentum_buffer` (p's shape, float32).

    Raises UsageError for tensors that are not matrices and for options that it does not know.
    """
    momentum, nesterov, steps = options.momentum, options.nesterov, options.steps
    adjust_lr, orthogonalize = options.adjust_lr, options.orthogonalize
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if not 0 <= momentum < 1:
        raise UsageError(f"muon: momentum must lie in [0, 1), got {momentum}")
    if options.dtype not in dtypes:
        raise UsageError(f"muon: dtype must be 'bfloat16' or 'float32', got {options.dtype!r}")
    dtype = dtypes[options.dtype]
    if orthogonalize not in ("newton_schulz", "exact"):
        raise UsageError(f"muon: orthogonalize must be 'newton_schulz' or 'exact', got {orthogonalize!r}")
    if adjust_lr not in ("match_rms_adamw", "original"):
        raise UsageError(f"muon: adjust_lr must be 'match_rms_adamw' or 'original', got {adjust_lr!r}")

    def init(p: Tensor) -> Slots:
        if p.ndim < 2:
            raise UsageError(f"muon needs a matrix, got shape {tuple(p.shape)}; give this tensor to another rule")
        return {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        m, n = p.shape[-2:]
        scale = 0.2 * max(m, n) ** 0.5 if adjust_lr == "match_rms_adamw" else max(1.0, m / n) ** 0.5
        buffer = slots["momentum_buffer"].lerp(g.float(), 1 - momentum)
        x = g.float().lerp(buffer, momentum) if nesterov else buffer
        o = polar(x) if orthogonalize == "exact" else newton_schulz(x, steps, dtype)
        delta = -hyper["lr"] * (scale * o.float() + hyper["weight_decay"] * p.float())
        return delta, {"momentum_buffer": buffer}

    def export(slots: Slots, p: Tensor) -> Moments:
        return Moments(slots["momentum_buffer"], None, (1 / (1 - momentum), 0.0))

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert moments.first is not None
        return {"momentum_buffer": moments.first.clone()}, "kept"

    return Rule(name, options, declare(momentum_buffer=Kind.FIRST), init, update, export=export, adopt=adopt)


muon = Family("muon", Muon, build)
