"""AdamW: Kingma & Ba, arXiv 1412.6980; decoupled decay, Loshchilov & Hutter, arXiv 1711.05101.

    m <- b1 m + (1 - b1) g                       v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr/(1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Equal to torch.optim.AdamW up to rounding. t counts a tensor's own active steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import CLOCK, clock, tick
from ..contract import Family, Hyper, Kind, Rule, Slots, declare
from ..moments import Moments, clocked, unbiased
from ..random import Key


@dataclass(frozen=True)
class AdamW:
    """AdamW's settings."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """What is added to the root of the second moment."""


def build(name: str, options: AdamW) -> Rule:
    """Slots: `exp_avg`, `exp_avg_sq` (p's shape, float32) and the scalars of `clock`."""
    betas, eps = options.betas, options.eps
    b1, b2 = betas

    def init(p: Tensor) -> Slots:
        zeros = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
        return {**clock(p), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        g, lr = g.float(), hyper["lr"]
        scalars, c1, c2 = tick(slots, betas)
        m = slots["exp_avg"].lerp(g, 1 - b1)
        v = slots["exp_avg_sq"] * b2 + (1 - b2) * g * g
        size, floor = lr * c2.sqrt() / c1, eps * c2.sqrt()  # both corrections as scalars: one division per entry
        delta = -size * (m / (v.sqrt() + floor)) - lr * hyper["weight_decay"] * p.float()
        return delta, {**scalars, "exp_avg": m, "exp_avg_sq": v}

    def export(slots: Slots, p: Tensor) -> Moments:
        return unbiased(slots, slots["exp_avg"], slots["exp_avg_sq"])

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        scalars, c1, c2 = clocked(moments, betas, p)
        assert moments.first is not None and moments.second is not None
        return {**scalars, "exp_avg": moments.first * c1, "exp_avg_sq": moments.second * c2}, "kept"

    slots = (*CLOCK, *declare(exp_avg=Kind.FIRST, exp_avg_sq=Kind.SECOND))
    return Rule(name, options, slots, init, update, export=export, adopt=adopt, elementwise=True, betas=betas)


adamw = Family("adamw", AdamW, build)
