"""A task: the model, its loss, the data and the metrics of a run. The trainer knows nothing else of what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .step.segments import Batch, Chain, Segment


@dataclass(frozen=True)
class Collected:
    """Rows of a batch, (n, k), for figures that are no sums, such as a rank correlation: + puts rows behind rows."""

    rows: Tensor

    def __add__(self, more: "Collected") -> "Collected":
        return Collected(torch.cat([self.rows, more.rows]))


Sum = Tensor | Collected  # of shape (2,): a sum and its count; of another one: what the task's report makes of it
Sums = dict[str, Sum]  # float64; what adds over batches and processes


class Task(ABC):
    """What a run trains.

    Its data are rows, in an order that never ends. A *position* is one integer, the rows consumed since the start of
    training; `batch(position, count)` is a pure function of it, so that a resumed run reads on where it stopped, in
    batches of whatever size. `fingerprint` is all that decides which row stands at a position: two tasks with equal
    ones read the same rows. Where epochs begin with a whole batch, `align` rows, the last one of an epoch is filled up
    with rows that count for nothing.
    """

    model: nn.Module
    """The module whose `named_parameters` are trained, in place."""
    rows: int
    """Rows in one pass over the data."""
    align: int = 1
    """Epochs begin at multiples of this many rows."""
    unit: str = "examples"
    """What the throughput counts."""
    loss_unit: str = ""
    """What the loss is measured in, for the labels of curves: "nats per token"."""

    @property
    def epoch(self) -> int:
        """Positions in one pass over the data, the last batch filled up."""
        return -(-self.rows // self.align) * self.align

    @abstractmethod
    def segments(self) -> Sequence[Segment]:
        """The model as a chain; the last segment's call gives the loss: see `Segment`."""

    @abstractmethod
    def batch(self, position: int, count: int) -> Batch:
        """Rows [position, position + count) of training, on the host; every field has `count` rows."""

    @abstractmethod
    def evaluation(self, count: int) -> Iterator[Batch]:
        """The held-out rows, the same ones every time, in batches of `count` rows or fewer."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What decides the row at a position, as JSON, under the names that a user knows (data, seed, sequence)."""

    def units(self, rows: int) -> int:
        """How many of `unit` so many rows of training hold."""
        return rows

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        """The sums of a held-out batch, which lies on the model's device. At least "loss", a sum and its count."""
        loss, count = chain.loss(dict(params), batch)
        return {"loss": torch.stack([loss.double(), count.double()])}

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """Metrics from sums over all held-out batches. At least "loss". Here: every sum over its count; what was
        collected, or is no pair, is the report's of a task that has some (`engine.tasks.scores`)."""
        pairs = {name: total for name, total in sums.items() if isinstance(total, Tensor) and total.shape == (2,)}
        if other := sums.keys() - pairs.keys():
            raise TypeError(f"{min(other)}: got no pair (sum, count); {type(self).__name__}.report has to handle it")
        return {name: float(total[0] / total[1]) for name, total in pairs.items()}

    def shown(self, metrics: Mapping[str, float]) -> str:
        """The metrics of an evaluation in a few words, for the progress line."""
        return "  ".join(f"held-out {v:.4f}" if k == "loss" else f"{k} {v:.4f}" for k, v in metrics.items())

    def model_config(self) -> dict[str, Any]:
        """What a checkpoint's config.json says of the model; a run resumes with an equal one only."""
        return {"model": type(self.model).__name__}


def add(total: Sums, more: Mapping[str, Sum]) -> None:
    """Add a batch's sums to those of the batches before it."""
    for name, value in more.items():
        before: Any = total.get(name)
        total[name] = value if before is None else before + value
