"""Classes of images: rows of pixels, augmented by their place in training, so that a resumed run sees the same ones."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.segment import IGNORED
from optimizers.random import fold

from ..data.images.augment import Augment, augmented, judged, normalized
from ..data.images.sets import Images
from ..data.order import Epochs, Ints, order
from ..step.segments import Batch, Chain, Segment, cut
from ..task import Sum, Sums, Task
from .scores import Scores
from .sequences import outputs


def blank(rows: int, channels: int, side: int) -> Batch:
    """A batch of the task's shapes and dtypes, on the current device, that says nothing: what a plan needs of it."""
    targets = torch.zeros(rows, dtype=torch.int64)
    return {"pixels": torch.zeros(rows, channels, side, side), "targets": targets}


def part(rows: int, limit: int | None) -> Ints:
    """At most `limit` of range(rows), ascending and always the same ones: not every n-th, as published sets may have
    their classes in turn."""
    count = rows if limit is None else min(limit, rows)
    return np.sort(order(0, 0, rows, np.arange(count)))


class ImageTask(Task):
    """Images of `side` rows and columns, in a new pseudo-random order each epoch; the loss is the mean over images.

    Where an epoch is filled up to whole steps, what fills it are the images that it began with, whose targets are
    IGNORED: batch norm then sees images, and the loss does not. An evaluation reads `most` held-out images, or
    all: the whole of each, or its middle where training takes crops of random size (`judged`). `config` is the model's.
    """

    loss_unit = "nats per image"
    unit = "images"

    def __init__(
        self,
        model: nn.Module,
        train: Images,
        held_out: Images,
        side: int,
        *,
        scores: Scores,
        config: Mapping[str, Any],
        augment: Augment = "none",
        padding: int = 4,
        norm: str = "half",
        seed: int = 0,
        align: int = 1,
        most: int | None = None,
        first: int | None = None,
    ) -> None:
        """`align`: rows of a step, where epochs must be whole steps; `first`: train on so many images alone. Such parts
        are those of `part`."""
        self.model, self.train, self.held_out, self.side = model, train, held_out, side
        self.scores, self._config, self.seed, self.align, self.most = scores, dict(config), seed, align, most
        self.augment, self.padding, self.norm = augment, padding, norm
        self.chosen = part(len(train.targets), first)
        self.rows = len(self.chosen)
        self.epochs = Epochs(self.rows, fold(seed, "data"), align)
        self.key = fold(seed, "augment")

    def segments(self) -> Sequence[Segment]:
        return cut(self.model)

    def batch(self, position: int, count: int) -> Batch:
        drawn = self.epochs.which(position, count)
        epochs = [(position + i) // self.epochs.length for i in range(count)]
        blank = drawn < 0
        for i in blank.nonzero()[0].tolist():  # the images with which the epoch began, which count for nothing
            beyond = (position + i) % self.epochs.length - self.rows
            drawn[i] = self.epochs.which(epochs[i] * self.epochs.length + beyond % self.rows, 1)[0]
        numbers = self.chosen[drawn]
        pixels, targets = self.train.get(numbers.tolist()), self.train.targets[torch.from_numpy(numbers)]
        rows = list(zip(epochs, numbers.tolist(), strict=True))
        pixels = augmented(pixels, self.augment, self.side, rows, self.key, self.padding)
        return {
            "pixels": normalized(pixels, self.norm),
            "targets": torch.where(torch.from_numpy(blank), IGNORED, targets),
        }

    def evaluation(self, count: int) -> Iterator[Batch]:
        chosen = part(len(self.held_out.targets), self.most)
        for first in range(0, len(chosen), count):
            numbers = chosen[first : first + count].tolist()
            filled = numbers + [numbers[0]] * (count - len(numbers))  # equal batches are compiled once
            targets = self.held_out.targets[torch.tensor(filled)]
            targets[len(numbers) :] = IGNORED
            pixels = judged(self.held_out.get(filled), self.augment, self.side)
            yield {"pixels": normalized(pixels, self.norm), "targets": targets}

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        loss, count, said = chain.judged(dict(params), batch, {"outputs": outputs})
        figures = self.scores.of(said["outputs"].argmax(1), batch["targets"])
        return {"loss": torch.stack([loss.double(), count.double()]), **figures}

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        return {**super().report({"loss": sums["loss"]}), **self.scores.report(sums)}

    def shown(self, metrics: Mapping[str, float]) -> str:
        return f"held-out {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.1%}"

    def fingerprint(self) -> dict[str, Any]:
        return {
            "data": self.train.fingerprint,
            "images": self.rows,
            "side": self.side,
            "augment": self.augment,
            "padding": self.padding if self.augment == "crop-flip" else 0,
            "norm": self.norm,
            "seed": self.seed,
        }

    def model_config(self) -> dict[str, Any]:
        return self._config
