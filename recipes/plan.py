"""The memory of a run, predicted from its config. The planner loads private modules of torch: only when asked."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engine.step.segments import cut

from .build import build
from .config import TrainConfig

if TYPE_CHECKING:
    from engine.planner.paper import PaperUnits
    from engine.planner.plan import Built, Plan


def device_of(config: TrainConfig) -> str:
    """The type of the device that a run would take, such as "cuda"; it need not be here."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return name.partition(":")[0]


def planned(
    config: TrainConfig, vocabulary: int = 0, epoch: int = 1000, device: str = "", last: int | None = None
) -> "Plan":
    """What a run holds at its peak; with `last`, on the CPU, what that step alone does. Raises UsageError."""
    from engine.planner.plan import plan

    device = device or device_of(config)
    steps = () if last is None or device == "cuda" else (last,)
    return plan(_builder(config, vocabulary, epoch), config, device, steps)


def in_paper_units(config: TrainConfig, vocabulary: int = 0) -> "PaperUnits":
    """Weights and state of a run as papers count them. Raises UsageError."""
    from engine.planner.paper import paper_units

    return paper_units(_builder(config, vocabulary, 1000))


def _builder(config: TrainConfig, vocabulary: int, epoch: int) -> "Callable[[], Built]":
    """What builds the run, on whatever tensors are made where it is called."""
    from engine.planner.plan import Built

    run = build(config, vocabulary or config.vocabulary(), epoch)

    def built() -> Built:
        params = run.place("cpu", fill=False)
        return Built(cut(run.model), params, run.optimizer, config.blank, run.key)

    return built
