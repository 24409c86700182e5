"""The learning-rate schedule: a pure function of the step, so a resumed run needs nothing but its step."""

import math
from dataclasses import dataclass
from typing import Literal

from optimizers.core import UsageError

Kind = Literal["cosine", "linear", "constant"]


def factor(step: int, steps: int, warmup: int = 0, kind: Kind = "cosine", floor: float = 0.0) -> float:
    """What the peak learning rate is multiplied by at the 0-based `step` of a run of `steps`.

    Warm-up is linear and never 0: (step + 1) / warmup, so step 0 moves and step `warmup - 1` is the peak. From the
    peak, "cosine" and "linear" fall to `floor` exactly at the last step, `steps - 1`; "constant" stays at 1. Where
    the peak is the last step it is 1. Beyond the last step the last value holds.
    """
    if kind not in ("cosine", "linear", "constant"):
        raise UsageError(f"kind must be 'cosine', 'linear' or 'constant', got {kind!r}; name one of them")
    if not (step >= 0 and steps >= 1):
        raise UsageError(f"step must be at least 0 and steps at least 1, got step={step} steps={steps}")
    if not 0 <= warmup <= steps:
        raise UsageError(f"warmup must lie in [0, steps={steps}], got {warmup}; shorten the warm-up or train longer")
    if not 0 <= floor <= 1:
        raise UsageError(f"floor is a fraction of the peak in [0, 1], got {floor}; for a rate, divide it by the peak")
    if step < warmup:
        return (step + 1) / warmup
    peak, last = max(warmup - 1, 0), steps - 1
    if kind == "constant" or peak == last:
        return 1.0
    done = min((step - peak) / (last - peak), 1.0)
    left = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return floor + (1 - floor) * left


@dataclass(frozen=True)
class Schedule:
    """`factor` with everything but the step settled and checked."""

    steps: int
    """Length of the run, in optimizer steps."""
    warmup: int = 0
    """Steps of linear warm-up; 0 starts at the peak."""
    kind: Kind = "cosine"
    """Shape of the decay after the warm-up."""
    floor: float = 0.0
    """Fraction of the peak at which the decay ends."""
    swapped: int = 0
    """The step from which another optimizer trains."""
    rewarm: int = 0
    """Steps of linear warm-up from there, to whatever the schedule asks for then."""

    def __post_init__(self) -> None:
        self.factor(0)

    def factor(self, step: int) -> float:
        """The multiplier of the peak learning rate at `step`."""
        since = step - self.swapped
        again = (since + 1) / self.rewarm if 0 <= since < self.rewarm else 1.0
        return again * factor(step, self.steps, self.warmup, self.kind, self.floor)
