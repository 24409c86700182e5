"""Masked language modelling (BERT, arXiv 1810.04805): predict the tokens that were hidden from the model.

Of the tokens that are none of the tokenizer's own, a share is to be predicted (15%): of these 80% are replaced by the
mask, 10% by a random token, and 10% stay. Which, is a function of seed, epoch and row, so a row is masked anew each
epoch, and a resumed run masks as one that was not stopped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.segment import IGNORED
from optimizers.contract import UsageError
from optimizers.random import fold

from ..data.chat.packing import EIGHTHS, supervised
from ..data.order import Epochs, Ints, filled
from ..data.pairs import Encoded
from ..step.segments import Batch, Chain
from ..step.tokens import SUPERVISED
from ..task import Sums
from .finetuning import right
from .sequences import blank as row_blank
from .tokens import TokenTask

HELD_OUT = -1  # the epoch of evaluations


def blank(rows: int, length: int, share: float) -> Batch:
    """A batch of the task's shapes and dtypes, on the current device, that says nothing: what a plan needs of it. The
    places of targets are as wide as the row that has most of them asks for, taken to be 1.5 deviations above the mean:
    about what the widest of a few rows is."""
    most = share * length + 1.5 * math.sqrt(share * (1 - share) * length)
    unit = max(-(-length // EIGHTHS), 1)
    fields = {**row_blank(rows, length, torch.int64), "targets": torch.zeros(rows, length, dtype=torch.int64)}
    return {**fields, SUPERVISED: torch.zeros(rows, min(math.ceil(most / unit) * unit, length), dtype=torch.int64)}


class MaskedRows:
    """Rows of `length` tokens, filled up with `pad`, some of them hidden by `mask`; `vocabulary` bounds random ones."""

    def __init__(
        self, encoded: Encoded, length: int, pad: int, mask: int, vocabulary: int, seed: int, align: int, share: float
    ) -> None:
        self.encoded, self.length, self.pad, self.mask = encoded, length, pad, mask
        self.vocabulary, self.seed, self.share = vocabulary, seed, share
        self.epochs = Epochs(len(encoded), fold(seed, "data"), align)

    def batch(self, position: int, count: int) -> Batch:
        """Rows [position, position + count) of training."""
        epochs = [(position + i) // self.epochs.length for i in range(count)]
        return self._batch(self.epochs.which(position, count).tolist(), epochs)

    def evaluation(self, size: int, limit: int | None) -> Iterator[Batch]:
        """`limit` rows evenly spaced, or all, always masked the same way; the last batch is filled up with blanks."""
        for numbers in filled(len(self.encoded), limit, size):
            yield self._batch(numbers, [HELD_OUT] * size)

    def _batch(self, numbers: Sequence[int], epochs: Sequence[int]) -> Batch:
        fields = self.encoded.rows(numbers, self.length, self.pad)
        targets = np.full_like(fields["input_ids"], IGNORED)
        for i, (k, epoch) in enumerate(zip(numbers, epochs, strict=True)):
            if k >= 0:
                own = slice(int(self.encoded.starts[k]), int(self.encoded.starts[k + 1]))
                size = own.stop - own.start
                ids = fields["input_ids"][i, :size]
                ids[:], targets[i, :size] = self._masked(ids, self.encoded.special[own], k, epoch)
        fields |= {"targets": targets, SUPERVISED: supervised(targets)}
        return {name: torch.from_numpy(a) for name, a in fields.items()}

    def _masked(self, ids: Ints, special: Any, row: int, epoch: int) -> tuple[Ints, Ints]:
        """What the model sees of a row, and what it is to predict."""
        draw = np.random.Generator(np.random.Philox(fold(self.seed, "mask", epoch, row)))
        chosen, how = draw.random((2, len(ids)))
        hidden = (chosen < self.share) & ~special
        seen = np.where(hidden & (how < 0.8), self.mask, ids)
        seen = np.where(hidden & (how >= 0.9), draw.integers(self.vocabulary, size=len(ids)), seen)
        return seen, np.where(hidden, ids, IGNORED)


class MaskedTask(TokenTask):
    """The loss is the mean cross-entropy of a hidden token, in nats. Evaluation reads `most` held-out rows, or all, and
    reports the share of hidden tokens that are foreseen. `config` is the model's in Hugging Face form."""

    loss_unit = "nats per hidden token"

    def __init__(
        self,
        model: nn.Module,
        train: Encoded,
        held_out: Encoded,
        length: int,
        *,
        mask: int,
        config: Mapping[str, Any],
        seed: int = 0,
        align: int = 1,
        most: int | None = None,
        share: float = 0.15,
    ) -> None:
        """`mask`: the token that hides others; `share`: of the tokens, to be predicted. Raises UsageError."""
        if not 0 < share < 1:
            raise UsageError(f"share of hidden tokens: got {share}, expected a number between 0 and 1")
        pad, vocabulary = int(config["pad_token_id"]), int(config["vocab_size"])
        hidden = (length, pad, mask, vocabulary, seed, align, share)
        super().__init__(model, length, MaskedRows(train, *hidden), MaskedRows(held_out, *hidden), config, most)
        self.encoded, self.rows, self.align, self.seed, self.share = train, len(train), align, seed, share

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        loss, count, said = chain.judged(dict(params), batch, {"accuracy": right})
        return {k: torch.stack([v.double(), count.double()]) for k, v in {"loss": loss, **said}.items()}

    def shown(self, metrics: Mapping[str, float]) -> str:
        return f"held-out {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.1%}"

    def fingerprint(self) -> dict[str, Any]:
        own = {"data": self.encoded.fingerprint, "sequence": self.sequence, "seed": self.seed}
        return {**own, "hidden": self.share}
