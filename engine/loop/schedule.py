"""The learning-rate schedule: a pure function of the step, so a resumed run needs nothing but its step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from optimizers.contract import UsageError

Kind = Literal["cosine", "linear", "constant", "wsd", "multistep"]
KINDS = ("cosine", "linear", "constant", "wsd", "multistep")


def factor(
    step: int,
    steps: int,
    warmup: int = 0,
    kind: Kind = "cosine",
    floor: float = 0.0,
    decay: int | None = None,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """What the peak learning rate is multiplied by at the 0-based `step` of a run of `steps`.

    Warm-up is linear and never 0: (step + 1) / warmup, so step 0 moves and step `warmup - 1` is the peak. From the
    peak, "cosine" and "linear" fall to `floor` exactly at step `decay - 1`, by default the last, `steps - 1`, and stay
    there; "wsd" (warm-up, stable, decay) stays at 1 and falls along a line over the last `decay` steps, by default a
    tenth, to `floor` at the last; "constant" stays at 1. Where the peak is the last step it is 1. Beyond the last step
    the last value holds. "multistep" is multiplied by `gamma` at each of the `milestones`, shares of the steps.
    """
    if kind not in KINDS:
        raise UsageError(f"kind must be {', '.join(map(repr, KINDS))}, got {kind!r}; name one of them")
    if not (step >= 0 and steps >= 1):
        raise UsageError(f"step must be at least 0 and steps at least 1, got step={step} steps={steps}")
    if not 0 <= warmup <= steps:
        raise UsageError(f"warmup must lie in [0, steps={steps}], got {warmup}; shorten the warm-up or train longer")
    if not 0 <= floor <= 1:
        raise UsageError(f"floor is a fraction of the peak in [0, 1], got {floor}; for a rate, divide it by the peak")
    _check_decay(steps, warmup, kind, decay)
    _check_milestones(kind, milestones, gamma)
    if step < warmup:
        return (step + 1) / warmup
    peak, last = max(warmup - 1, 0), steps - 1
    if kind == "multistep":
        return float(gamma ** sum(min(step, last) >= round(share * steps) for share in milestones))
    if kind == "wsd":
        falls = max(1, steps // 10) if decay is None else decay
        peak = max(peak, last - falls)
    elif decay is not None:
        last = decay - 1
    if kind == "constant" or peak >= last:
        return 1.0
    done = min(max(step - peak, 0) / (last - peak), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
    return floor + (1 - floor) * left


def _check_decay(steps: int, warmup: int, kind: Kind, decay: int | None) -> None:
    """Raises UsageError where the decay has no room, or nothing decays."""
    if decay is None:
        return
    if kind == "constant":
        raise UsageError(f"decay-steps: got {decay}, but a constant schedule does not decay; leave it out")
    if kind == "multistep":
        raise UsageError(f"decay-steps: got {decay}, but a multistep schedule decays at its milestones; leave it out")
    if kind == "wsd" and not 1 <= decay <= steps - warmup:
        raise UsageError(
            f"decay-steps must lie in [1, {steps - warmup}], between warm-up and end, got {decay}; shorten it"
        )
    if kind != "wsd" and not decay > max(warmup, 1):
        raise UsageError(f"decay-steps, where the decay ends, must be above 1 and warmup={warmup}, got {decay}")


def _check_milestones(kind: Kind, milestones: Sequence[float], gamma: float) -> None:
    """Raises UsageError where milestones say nothing, or nothing has them."""
    if (kind == "multistep") != bool(milestones):
        way = "give some, such as 0.5 0.75" if kind == "multistep" else "it has none; leave them out"
        raise UsageError(f"milestones: got {list(milestones) or 'none'} with the schedule {kind!r}; {way}")
    if any(not 0 < share < 1 for share in milestones) or list(milestones) != sorted(milestones):
        raise UsageError(f"milestones: got {list(milestones)}, expected shares of the steps in (0, 1), ascending")
    if not 0 < gamma <= 1:
        raise UsageError(f"gamma must lie in (0, 1], got {gamma}")
    if kind != "multistep" and gamma != 0.1:
        raise UsageError(f"gamma: got {gamma} with the schedule {kind!r}, which has no milestones; leave it out")


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
    decay: int | None = None
    """Of "cosine" and "linear": the step at which the decay ends, by default the last. Of "wsd": how many of the last
    steps decay, by default a tenth."""
    milestones: tuple[float, ...] = ()
    """Of "multistep": shares of the steps, at each of which the rate falls."""
    gamma: float = 0.1
    """Of "multistep": what the rate is multiplied by there."""
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
        shape = self.kind, self.floor, self.decay, self.milestones, self.gamma
        return again * factor(step, self.steps, self.warmup, *shape)


def rate_changes(step: int, before: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A line where learning rates at the resumed `step`, by group, are others than the run had before; else none."""
    changed = [name for name in now if name in before and not math.isclose(before[name], now[name], rel_tol=1e-6)]
    if not changed:
        return []
    said = ", ".join(
        f"{name} {before[name]:.3g} -> {now[name]:.3g}{_times(before[name], now[name])}" for name in changed
    )
    return [
        f"learning rate at step {step + 1}: {said}. Schedule, steps or rates were changed; to lengthen a run without a "
        "jump, keep the decay where it was with --decay-steps, or train with --schedule wsd"
    ]


def _times(before: float, now: float) -> str:
    return f" (x {now / before:.2f})" if before > 0 else ""
