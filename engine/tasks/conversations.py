"""Fine-tuning on conversations: predict the tokens of answers, in packed rows of whole examples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimizers.contract import UsageError
from optimizers.random import fold

from ..data.chat.packing import Longer, Packed
from ..data.chat.reader import Examples
from ..step.segments import Batch
from .tokens import TokenTask


def blank(rows: int, sequence: int) -> Batch:
    """A batch of the task's shapes and dtypes, on the current device, that says nothing: what a plan needs of it.

    All of its targets are supervised, as in the largest batch that there can be.
    """
    names = ("input_ids", "targets", "positions", "documents", "supervised")
    return {name: torch.zeros(rows, sequence, dtype=torch.int64) for name in names}


class ConversationTask(TokenTask):
    """Rows of `sequence` tokens that hold whole examples of a prepared folder, in a new pseudo-random order each epoch.

    The loss is the mean cross-entropy of a trained token, in nats, over all that a step holds. Evaluation reads
    `eval_rows` rows of the held-out examples, evenly spaced, or all. `config` is the model's in Hugging Face form.
    """

    loss_unit = "nats per trained token"

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        held_out: Examples,
        sequence: int,
        *,
        config: Mapping[str, Any],
        seed: int = 0,
        align: int = 1,
        eval_rows: int | None = None,
        longer: Longer = "refuse",
        pack: bool = True,
    ) -> None:
        """`longer`: what becomes of examples longer than the sequence; `pack`: several examples a row; `align`: rows of
        a step, where epochs must be whole steps. Raises UsageError for an example that does not fit, for a model whose
        vocabulary is smaller than the tokenizer's, and for one of fewer positions than the sequence."""
        if (known := config.get("vocab_size", examples.vocab_size)) < examples.vocab_size:
            raise UsageError(
                f"vocabulary: got a model of {known:,} tokens, expected the tokenizer's {examples.vocab_size:,} at "
                "least; prepare the examples with the checkpoint's own tokenizer"
            )
        if (positions := config.get("max_position_embeddings", sequence)) < sequence:
            raise UsageError(
                f"--sequence: got {sequence:,}, expected at most max_position_embeddings = {positions:,}; shorten it"
            )
        self.seed, self.align, self.longer, self.pack = seed, align, longer, pack
        self.train = Packed(examples, sequence, fold(seed, "data"), align, longer=longer, pack=pack)
        self.held_out = Packed(held_out, sequence, longer=longer, pack=pack)
        self.rows = len(self.train.rows)
        super().__init__(model, sequence, self.train, self.held_out, config, eval_rows)

    def fingerprint(self) -> dict[str, Any]:
        examples = self.train.examples
        return {
            "data": examples.fingerprint,
            "tokenizer": examples.tokenizer,
            "sequence": self.sequence,
            "longer": self.longer,
            "pack": self.pack,
            "seed": self.seed,
        }

    def in_words(self) -> list[str]:
        """What a user should know of the examples before the first step, a line each."""
        held_out = f"held out: {self.held_out.in_words()}"
        return [self.train.examples.format, f"train: {self.train.in_words()}", held_out]
