"""Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    B <- mu B + (1 - mu) G                 N = (1 - mu) G + mu B  if nesterov else  B
    O = NewtonSchulz5(N)  ~ U V^T of N     W <- (1 - lr wd) W - lr s O

Equal to torch.optim.Muon, in its defaults and both its scales: `original` s = sqrt(max(1, m/n)), and
`match_rms_adamw` s = 0.2 sqrt(max(m, n)) (Liu et al., arXiv 2502.16982), under which AdamW's lr and decay carry over.
The iteration does not converge to U V^T: singular values end in about [0.7, 1.2], by design.
"""

import torch
from torch import Tensor

from .core import Hyper, Rule, Slots, UsageError


def newton_schulz(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate polar factor of x (..., m, n) by Muon's quintic iteration, computed and returned in `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = x.shape[-2] > x.shape[-1]
    o = x.to(dtype).mT if transposed else x.to(dtype)
    o = o / o.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    shape, o = o.shape, o.flatten(0, -3) if o.ndim > 2 else o
    fused = torch.baddbmm if o.ndim > 2 else torch.addmm  # one rounding for a sum and a product, as torch.optim.Muon
    for _ in range(steps):
        gram = o @ o.mT
        o = fused(o, fused(gram, gram, gram, beta=b, alpha=c), o, beta=a)
    o = o.reshape(shape)
    return o.mT if transposed else o


def muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    adjust_lr: str = "match_rms_adamw",
    dtype: torch.dtype = torch.bfloat16,
) -> Rule:
    """Slots: `momentum_buffer` (p's shape, float32). `dtype` is that of the Newton-Schulz iteration.

    Raises UsageError for tensors that are not matrices and for an unknown `adjust_lr`.
    """
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
        o = newton_schulz(g.float().lerp(buffer, momentum) if nesterov else buffer, steps, dtype)
        delta = -hyper["lr"] * (scale * o.float() + hyper["weight_decay"] * p.float())
        return delta, {"momentum_buffer": buffer}

    return Rule("muon", init, update)
