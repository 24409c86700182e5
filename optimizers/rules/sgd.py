"""SGD with momentum (Polyak 1964; Nesterov's form as in Sutskever et al. 2013) and decoupled weight decay.

    b <- mu b + g          w <- (1 - lr wd) w - lr (g + mu b  if nesterov else  b)

Equal to torch.optim.SGD with dampening 0 at wd 0. torch couples the decay with the gradient; here it is decoupled,
as in every other rule, so that a decay means the same under all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Family, Hyper, Kind, Rule, Slots, UsageError, declare
from ..moments import UNKNOWN, Moments
from ..random import Key


@dataclass(frozen=True)
class SGD:
    """SGD's settings."""

    momentum: float = 0.9
    """Decay of the sum of gradients; at 0 there is no state."""
    nesterov: bool = False
    """Step as if the momentum had moved already."""


def build(name: str, options: SGD) -> Rule:
    """Slots: `momentum_buffer` (p's shape, float32), or none at momentum 0."""
    momentum, nesterov = options.momentum, options.nesterov
    if not 0 <= momentum < 1:
        raise UsageError(f"sgd: momentum must lie in [0, 1), got {momentum}")
    if nesterov and not momentum:
        raise UsageError("sgd: nesterov needs a momentum above 0; got momentum 0")

    def init(p: Tensor) -> Slots:
        return (
            {"momentum_buffer": torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)}
            if momentum
            else {}
        )

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor, Slots]:
        g = g.float()
        if momentum:
            buffer = momentum * slots["momentum_buffer"] + g
            g, slots = g + momentum * buffer if nesterov else buffer, {"momentum_buffer": buffer}
        return -hyper["lr"] * (g + hyper["weight_decay"] * p.float()), slots

    def export(slots: Slots, p: Tensor) -> Moments:
        return Moments((1 - momentum) * slots["momentum_buffer"], None, (1 / (1 - momentum), 0.0)) if slots else UNKNOWN

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert moments.first is not None
        return ({"momentum_buffer": moments.first / (1 - momentum)}, "kept") if slots else (slots, "dropped")

    slots = declare(momentum_buffer=Kind.FIRST) if momentum else ()
    return Rule(name, options, slots, init, update, export=export, adopt=adopt, elementwise=True)


sgd = Family("sgd", SGD, build)
