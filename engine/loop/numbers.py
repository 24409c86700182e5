"""Sums of the steps' losses and norms between two log lines. They stay on the device until a line is printed."""

import math
from collections.abc import Mapping

import torch

from optimizers.contract import Group, Hyper

from ..step.step import Result


class NotFinite(Exception):
    """A step's loss or gradients are not finite; the message says which step and which parameter."""


class Numbers:
    """Losses, norms and refreshes of steps, read in one transfer."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, Result]] = []  # steps whose numbers nobody has read yet
        self.skipped = 0  # bases kept because the gradient at their refresh was unusable

    def add(self, step: int, result: Result) -> None:
        """Keep the numbers of a step, counted from 0."""
        self.pending.append((step, result))

    def settle(self, groups: Mapping[str, Group], hypers: Mapping[str, Hyper]) -> dict[str, float]:
        """The mean loss of the steps since the last call, and the last norm and rates. Raises NotFinite."""
        losses = torch.stack([r.loss for _, r in self.pending]).tolist()
        norms = torch.stack([r.norm for _, r in self.pending]).tolist()
        for (step, result), loss, norm in zip(self.pending, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}; {_where(result, loss)}")
        refreshed = [ok for _, r in self.pending for ok in r.refreshed]
        if refreshed:
            self.skipped += len(refreshed) - int(torch.stack(refreshed).sum())
        self.pending = []
        scalars = {"train/loss": sum(losses) / len(losses), "train/grad_norm": norms[-1]}
        scalars |= {f"train/learning_rate/{name}": hyper["lr"].item() for name, hyper in hypers.items()}
        if any(group.rule.gap for group in groups.values()):
            scalars["optim/refreshes"] = float(len(refreshed))
            scalars["optim/refreshes_skipped"] = float(self.skipped)
        return scalars


def _where(result: Result, loss: float) -> str:
    if name := result.first_nonfinite():
        return f"the first gradient that is not finite, in backward order, is that of {name}"
    return "every gradient is finite" + (", but their norm overflows" if math.isfinite(loss) else "")
