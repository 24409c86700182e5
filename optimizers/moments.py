"""What rules know of a gradient, in terms that any rule can take over: how state moves from one rule to another.

A rule's `export` says what its slots estimate, its `adopt` starts from such estimates. In between nothing is left of
either rule, so n rules need 2 n functions and not n^2. What a rule never kept, it cannot say: a subspace rule knows
nothing outside its subspace, a rule without second moments has none.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Estimates of E[g] and E[g^2], of p's shape, float32, free of start-up bias; None where nothing is known.

    `seen` is how many gradients stand behind each.
    """

    first: Tensor | None
    second: Tensor | None
    seen: tuple[float, float]


UNKNOWN = Moments(None, None, (0.0, 0.0))
GUESSED = 10.0  # gradients that a guessed second moment weighs: AdamW's own have replaced it after as many steps


def factored(v: Tensor) -> Tensor:
    """The rank-one matrix with v's row and column means (Adafactor, arXiv 1804.04235): no entry of a nonzero v's rows
    and columns is zero, so an estimate that is missing entries does not ask for infinite steps."""
    if v.ndim < 2:
        return v
    mean = v.mean((-2, -1), keepdim=True)  # divided by first: a product of two means of v may leave float32's range
    return v.mean(-1, keepdim=True) * (v.mean(-2, keepdim=True) / torch.where(mean > 0, mean, 1))


def complete(moments: Moments, decay: float = 0.95) -> Moments:
    """Both moments, given either. A first moment of pure noise under an average of this decay has (1 - decay) /
    (1 + decay) of the second's size: the guess, with its entries evened out as `factored` does."""
    first, second, (seen1, seen2) = moments
    if first is None and second is None:
        return moments
    if first is None:
        assert second is not None
        return Moments(torch.zeros_like(second), second, (0.0, seen2))
    if second is None:
        return Moments(first, factored(first.square()) * ((1 + decay) / (1 - decay)), (seen1, GUESSED))
    return moments


def clocked(moments: Moments, betas: tuple[float, float], like: Tensor) -> tuple[dict[str, Tensor], float, float]:
    """(the slots of `clock` after `seen` gradients, 1 - beta1^seen, 1 - beta2^seen)."""
    c1, c2 = (1 - beta**seen if beta < 1 else 1.0 for beta, seen in zip(betas, moments.seen, strict=True))
    step = torch.tensor(max(moments.seen), dtype=torch.float32, device=like.device)
    return {"step": step, "bias_correction": torch.tensor([c1, c2], dtype=torch.float64, device=like.device)}, c1, c2


def unbiased(slots: dict[str, Tensor], first: Tensor | None, second: Tensor | None) -> Moments:
    """Moments of biased averages that `clock` counts."""
    step, (c1, c2) = slots["step"].item(), slots["bias_correction"].tolist()
    if not step:
        return UNKNOWN
    return Moments(
        None if first is None or not c1 else first / c1, None if second is None or not c2 else second / c2, (step, step)
    )
