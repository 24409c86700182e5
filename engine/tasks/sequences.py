"""Tasks of an encoder over whole texts: which class a row is of, or which number stands for it."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.segment import IGNORED
from optimizers.random import fold

from ..data.order import Epochs, filled
from ..data.pairs import Encoded
from ..step.segments import Batch, Chain, Segment, cut
from ..task import Sum, Sums, Task
from .scores import Scores


def blank(rows: int, length: int, targets: torch.dtype) -> Batch:
    """A batch of the tasks' shapes and dtypes, on the current device, that says nothing: what a plan needs of it."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    fields = {name: torch.zeros(rows, length, dtype=torch.int64) for name in names}
    return {**fields, "targets": torch.zeros(rows, dtype=targets)}


class RowTask(Task):
    """Rows of at most `length` tokens, filled up with `pad`, in a new pseudo-random order each epoch.

    The loss is the mean over rows. An evaluation reads `most` held-out rows, evenly spaced, or all; `scores` are those
    of all rows together. `config` is the model's in Hugging Face form.
    """

    dtype: torch.dtype  # of targets
    nothing: float  # a target that does not count

    def __init__(
        self,
        model: nn.Module,
        train: Encoded,
        held_out: Encoded,
        length: int,
        *,
        scores: Scores,
        config: Mapping[str, Any],
        pad: int = 0,
        seed: int = 0,
        align: int = 1,
        most: int | None = None,
    ) -> None:
        """`align`: rows of a step, where epochs must be whole steps."""
        self.model, self.train, self.held_out, self.length = model, train, held_out, length
        self.scores, self._config, self.pad, self.seed = scores, dict(config), pad, seed
        self.align, self.most, self.rows = align, most, len(train)
        self.epochs = Epochs(len(train), fold(seed, "data"), align)

    def segments(self) -> Sequence[Segment]:
        return cut(self.model)

    def batch(self, position: int, count: int) -> Batch:
        return self._batch(self.train, self.epochs.which(position, count).tolist())

    def evaluation(self, count: int) -> Iterator[Batch]:
        for numbers in filled(len(self.held_out), self.most, count):
            yield self._batch(self.held_out, numbers)

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        loss, count, said = chain.judged(dict(params), batch, {"outputs": outputs})
        figures = self.scores.of(self.predicted(said["outputs"].float()), batch["targets"])
        return {"loss": torch.stack([loss.double(), count.double()]), **figures}

    @abstractmethod
    def predicted(self, outputs: Tensor) -> Tensor:
        """What the head's outputs (n, k) say of each row, (n,)."""

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        return {**super().report({"loss": sums["loss"]}), **self.scores.report(sums)}

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self.train.fingerprint, "sequence": self.length, "seed": self.seed}

    def model_config(self) -> dict[str, Any]:
        return self._config

    def _batch(self, rows: Encoded, numbers: Sequence[int]) -> Batch:
        fields = {name: torch.from_numpy(a) for name, a in rows.rows(numbers, self.length, self.pad).items()}
        targets = [rows.targets[k] if k >= 0 else self.nothing for k in numbers]
        return {**fields, "targets": torch.from_numpy(np.array(targets)).to(self.dtype)}


class ClassificationTask(RowTask):
    """Targets are classes, int64; `scores` are `ClassScores`."""

    loss_unit = "nats per example"
    dtype, nothing = torch.int64, IGNORED

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)


class RegressionTask(RowTask):
    """Targets are numbers, float32; `scores` are `NumberScores`."""

    loss_unit = "squared error"
    dtype, nothing = torch.float32, math.nan

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0]


def outputs(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """What the last segment says of each row, (n, k)."""
    found: Tensor = module(x)
    return found
