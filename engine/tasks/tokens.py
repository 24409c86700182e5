"""What tasks over rows of tokens share: batches of a decoder's inputs and targets, a loss per token, perplexity."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..step.segments import Batch, Segment, cut
from ..task import Sum, Task

MOST = 700.0  # exp of more is no float


class Rows(Protocol):
    """Rows of tokens in their order: windows of a text, or packed examples."""

    def batch(self, position: int, count: int) -> Batch:
        """Rows [position, position + count) of training."""

    def evaluation(self, size: int, limit: int | None) -> Iterator[Batch]:
        """`limit` held-out rows evenly spaced, or all, in batches of `size`."""


class TokenTask(Task):
    """A decoder on rows of `sequence` tokens. `config` is the model's in Hugging Face form; an evaluation reads `most`
    held-out rows, or all."""

    unit = "tokens"

    def __init__(
        self, model: nn.Module, sequence: int, train: Rows, held_out: Rows, config: Mapping[str, Any], most: int | None
    ) -> None:
        self.model, self.sequence, self._config, self.most = model, sequence, dict(config), most
        self._train, self._held_out = train, held_out

    def segments(self) -> Sequence[Segment]:
        return cut(self.model)

    def batch(self, position: int, count: int) -> Batch:
        return self._train.batch(position, count)

    def evaluation(self, count: int) -> Iterator[Batch]:
        return self._held_out.evaluation(count, self.most)

    def units(self, rows: int) -> int:
        return rows * self.sequence

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        found = super().report(sums)
        return {**found, "perplexity": math.exp(min(found["loss"], MOST))}

    def shown(self, metrics: Mapping[str, float]) -> str:
        return super().shown({"loss": metrics["loss"]})

    def model_config(self) -> dict[str, Any]:
        return self._config
