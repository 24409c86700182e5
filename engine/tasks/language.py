"""Language modelling: predict the next token of packed windows of text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimizers.random import fold

from ..data import Batches, Tokens
from ..step.segments import Batch
from .tokens import TokenTask


def blank(rows: int, sequence: int, apart: bool = False) -> Batch:
    """A batch of the task's shapes and dtypes, on the current device, that says nothing: what a plan needs of it."""
    names = ("input_ids", "targets", *(("documents", "positions") if apart else ()))
    return {name: torch.zeros(rows, sequence, dtype=torch.int64) for name in names}


class LanguageTask(TokenTask):
    """Windows of `sequence` tokens of a prepared text, in a new pseudo-random order each epoch.

    The loss is the mean cross-entropy of a token, in nats. Evaluation reads `eval_windows` windows of the held-out
    text, evenly spaced over it, or all where there are no more. `config` is the model's in Hugging Face form. With
    `apart` no document of a window sees another one, and positions restart in each.
    """

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
        self.seed, self.align = seed, align
        self.train = Batches(tokens, sequence, fold(seed, "data"), align, apart)
        self.held_out = Batches(held_out, sequence, apart=apart)
        super().__init__(model, sequence, self.train, self.held_out, config, eval_windows)
        self.rows = self.train.windows

    def fingerprint(self) -> dict[str, Any]:
        tokens = self.train.tokens
        return {
            "data": tokens.fingerprint,
            "tokenizer": tokens.tokenizer,
            "sequence": self.sequence,
            "seed": self.seed,
        }
