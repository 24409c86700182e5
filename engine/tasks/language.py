"""Language modelling: predict the next token of packed windows of text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.random import fold

from ..data import Batches, Tokens
from ..step.segments import Batch, Segment, cut
from ..task import Task

MOST = 700.0  # exp of more is no float


def blank(rows: int, sequence: int, apart: bool = False) -> Batch:
    """A batch of the task's shapes and dtypes, on the current device, that says nothing: what a plan needs of it."""
    names = ("input_ids", "targets", *(("documents", "positions") if apart else ()))
    return {name: torch.zeros(rows, sequence, dtype=torch.int64) for name in names}


class LanguageTask(Task):
    """Windows of `sequence` tokens of a prepared text, in a new pseudo-random order each epoch.

    The loss is the mean cross-entropy of a token, in nats. Evaluation reads `eval_windows` windows of the held-out
    text, evenly spaced over it, or all where there are no more. `config` is the model's in Hugging Face form. With
    `apart` no document of a window sees another one, and positions restart in each.
    """

    unit = "tokens"
    loss_unit = "nats per token"

    def __init__(
        self,
        model: nn.Module,
        tokens: Tokens,
        held_out: Tokens,
        sequence: int,
        *,
        config: Mapping[str, Any],
        seed: int = 0,
        align: int = 1,
        eval_windows: int | None = None,
        apart: bool = False,
    ) -> None:
        """`align`: rows of a step, where epochs must be whole steps. Raises UsageError where a text is too short."""
        self.model, self.sequence, self.seed, self.align = model, sequence, seed, align
        self.eval_windows, self._config = eval_windows, dict(config)
        self.train = Batches(tokens, sequence, fold(seed, "data"), align, apart)
        self.held_out = Batches(held_out, sequence, apart=apart)
        self.rows = self.train.windows

    def segments(self) -> Sequence[Segment]:
        return cut(self.model)

    def batch(self, position: int, count: int) -> Batch:
        return self.train.batch(position, count)

    def evaluation(self, count: int) -> Iterator[Batch]:
        return self.held_out.evaluation(count, self.eval_windows)

    def fingerprint(self) -> dict[str, Any]:
        tokens = self.train.tokens
        return {
            "data": tokens.fingerprint,
            "tokenizer": tokens.tokenizer,
            "sequence": self.sequence,
            "seed": self.seed,
        }

    def units(self, rows: int) -> int:
        return rows * self.sequence

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        found = super().report(sums)
        return {**found, "perplexity": math.exp(min(found["loss"], MOST))}

    def shown(self, metrics: Mapping[str, float]) -> str:
        return super().shown({"loss": metrics["loss"]})

    def model_config(self) -> dict[str, Any]:
        return self._config
