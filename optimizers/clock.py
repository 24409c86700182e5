"""How many steps a tensor has taken, and the corrections for averages that started from zero."""

import torch
from torch import Tensor

from .contract import Kind, Slots, declare

STEP, CORRECTION = "step", "bias_correction"
CLOCK = declare(**{STEP: Kind.COUNTER, CORRECTION: Kind.COUNTER})


def clock(p: Tensor) -> Slots:
    """Slots that count: `step` (0-d float32) and `bias_correction` = (1 - beta1^step, 1 - beta2^step), float64.

    The pair is one tensor because torch 2.13 loses, without a word, what a compiled function writes into a 0-d
    float64 tensor on the CPU.
    """
    return {STEP: p.new_zeros((), dtype=torch.float32), CORRECTION: p.new_zeros(2, dtype=torch.float64)}


def tick(slots: Slots, betas: tuple[float, float]) -> tuple[Slots, Tensor, Tensor]:
    """One active step: (the slots of `clock`, 1 - beta1^t, 1 - beta2^t), the two as 0-d float32.

    The corrections are carried by c <- beta c + (1 - beta) because a power of the step inside a fused update is
    evaluated again for every vector of the tensor (1.6 times the time of a whole AdamW update).
    """
    c1, c2 = (c * beta + (1 - beta) for c, beta in zip(slots[CORRECTION], betas, strict=True))
    return {STEP: slots[STEP] + 1, CORRECTION: torch.stack([c1, c2])}, c1.float(), c2.float()
