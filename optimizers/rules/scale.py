"""SCALE: Glentis, Li, Han & Hong, "A Minimalist Optimizer Design for LLM Pretraining", ICML 2026, arXiv 2506.16659.

    M <- mu M + (1 - mu) G  on the head alone;  elsewhere mu = 0 and M is G, so that nothing is kept
    C_ij = M_ij / max(RMS_i, eps),   RMS_i of row i, over its entries
    W <- (1 - lr wd) W - lr C

The paper normalises columns, "along the output dimension": its W is (in, out), ours (out, in), so a column there is a
row here: what leads to one output. An embedding (tokens, width) maps the other way, and gets `each="column"`. The head
needs `momentum=0.9`, as its gradient has the largest variance; `each="column"` diverges there, says the paper. Vectors
go to another rule; the authors give them to AdamW.

Where this differs. The paper divides by a row's norm; this divides by its RMS, as the authors' code does, so that a
learning rate does not depend on the width. Leading dimensions are a stack of matrices.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..moments import UNKNOWN, Moments
from ..random import Key


@dataclass(frozen=True)
class Scale:
    """SCALE's settings."""

    momentum: float = 0.0
    """Decay of the average gradient; at 0 there is no state. The paper has 0.9 on the head."""
    each: Literal["row", "column"] = "row"
    """What gets a root mean square of 1: a row (one output of a linear map) or a column (of an embedding)."""
    eps: float = 1e-8
    """The least root mean square that is divided by."""


def build(name: str, options: Scale) -> Rule:
    """Slots: `momentum_buffer` (p's shape, float32), or none at momentum 0.

    Raises UsageError for tensors that are not matrices and for options that it does not know.
    """
    momentum, eps = options.momentum, options.eps
    if not 0 <= momentum < 1:
        raise UsageError(f"{name}: momentum must lie in [0, 1), got {momentum}")
    if options.each not in ("row", "column"):
        raise UsageError(f"{name}: each must be 'row' or 'column', got {options.each!r}")
    if not eps > 0:
        raise UsageError(f"{name}: eps must be above 0, got {eps}")
    over = -1 if options.each == "row" else -2

    def init(p: Tensor) -> Slots:
        if p.ndim < 2:
            raise UsageError(f"{name} needs a matrix, got shape {tuple(p.shape)}; give this tensor to another rule")
        if not momentum:
            return {}
        return {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        g = g.float()
        if momentum:
            g = slots["momentum_buffer"].lerp(g, 1 - momentum)
            slots = {"momentum_buffer": g}
        size = g.square().mean(over, keepdim=True).sqrt().clamp(min=eps)
        return -hyper["lr"] * (g / size + hyper["weight_decay"] * p.float()), slots

    def export(slots: Slots, p: Tensor) -> Moments:
        return Moments(slots["momentum_buffer"], None, (1 / (1 - momentum), 0.0)) if slots else UNKNOWN

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert moments.first is not None
        return ({"momentum_buffer": moments.first.clone()}, "kept") if slots else (slots, "dropped")

    slots = declare(momentum_buffer=Kind.FIRST) if momentum else ()
    return Rule(name, options, slots, init, update, export=export, adopt=adopt)


scale = Family("scale", Scale, build)
