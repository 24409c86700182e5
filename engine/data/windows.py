"""Prepared tokens as windows, and batches of windows at a position of the run.

The files of a prepared folder are only read here, memory-mapped.

Everything is a pure function of a position: there is no iterator state. A run that has consumed p windows goes on at p.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.segment import IGNORED
from optimizers.contract import UsageError

from .index import read_index
from .order import Epochs, Ints, spaced
from .split import Side


class Tokens:
    """The tokens of one split of a prepared folder, as one long sequence.

    `eos` and `vocab_size` are the tokenizer's, `tokenizer` is its fingerprint; `fingerprint` is equal for equal tokens,
    however cut into files.
    """

    def __init__(self, folder: Path, split: Side = "train") -> None:
        index = read_index(folder)
        if kind := index.get("kind"):
            raise UsageError(f"{folder}: holds {kind} with masks, expected text; prepare text, or fine-tune on it")
        self.folder, self.split = folder, split
        self.eos: int = index["tokenizer"]["eos"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer: str = index["tokenizer"]["fingerprint"]
        self.documents: int = index["splits"][split]["documents"]
        self.fingerprint: str = index["splits"][split]["sha256"]
        shards, dtype = index["splits"][split]["shards"], np.dtype(index["dtype"]).newbyteorder("<")
        self._shards = [mapped(folder / shard["file"], shard["tokens"], dtype) for shard in shards]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [start, stop), from as many shards as they lie in."""
        first, last = np.searchsorted(self._starts, (start, stop - 1), side="right") - 1
        inside = [(self._shards[k], int(self._starts[k])) for k in range(first, last + 1)]
        return np.concatenate([shard[max(start - at, 0) : stop - at] for shard, at in inside]).astype(np.int64)

    def windows(self, seq: int) -> int:
        """How many windows of `seq` targets cover the split. Raises UsageError where not even one is full."""
        if seq < 1:
            raise UsageError(f"sequence length: got {seq}; expected at least 1")
        if len(self) < seq + 1:
            raise UsageError(
                f"{self.folder}: sequence length: got {seq}, expected less than {self.split}'s {len(self):,} tokens; "
                "use shorter sequences or more data (for validation, a larger validation_fraction)"
            )
        return -(-(len(self) - 1) // seq)

    def window(self, k: int, seq: int) -> tuple[Ints, Ints]:
        """Inputs (seq,) and targets (seq,) of window k: the targets are the inputs' successors.

        Over all windows every token but the very first is a target exactly once: the last window ends where the split
        ends, and of its targets those that the window before already had are IGNORED.
        """
        start = min(k * seq, len(self) - 1 - seq)
        tokens = self.read(start, start + seq + 1)
        inputs, targets = tokens[:-1], tokens[1:].copy()
        targets[: k * seq - start] = IGNORED
        return inputs, targets


class Batches:
    """Windows of `seq` tokens, in a new pseudo-random order each epoch, forever: see `Epochs`. Blanks are rows without
    any target. With `apart`, batches say which document each token belongs to."""

    def __init__(self, tokens: Tokens, seq: int, seed: int = 0, align: int = 1, apart: bool = False) -> None:
        self.tokens, self.seq, self.seed, self.apart = tokens, seq, seed, apart
        self.windows = tokens.windows(seq)
        self.epochs = Epochs(self.windows, seed, align)
        self.epoch = self.epochs.length  # positions in one

    def which(self, position: int, size: int) -> Ints:
        """The windows at `position`, ..., `position + size - 1`; -1 is a blank."""
        return self.epochs.which(position, size)

    def batch(self, position: int, size: int) -> dict[str, Tensor]:
        """`input_ids` and `targets`, int64 (size, seq). Targets are shifted already; IGNORED ones count for nothing.

        With `apart` also `documents` and `positions`, of the same shape: see `borders`.
        """
        rows = [self.tokens.window(int(k), self.seq) if k >= 0 else self._blank for k in self.which(position, size)]
        return self._stack(rows)

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """`limit` windows (all by default), evenly spaced over the text and in its order, as batches like `batch`'s.

        They are the same ones every time. The last batch is filled up with rows without any target, so that every
        batch has the same shape.
        """
        chosen = spaced(self.windows, limit)
        for first in range(0, len(chosen), size):
            rows = [self.tokens.window(int(k), self.seq) for k in chosen[first : first + size]]
            yield self._stack(rows + [self._blank] * (size - len(rows)))

    @property
    def _blank(self) -> tuple[Ints, Ints]:
        return np.full(self.seq, self.tokens.eos), np.full(self.seq, IGNORED)

    def _stack(self, rows: list[tuple[Ints, Ints]]) -> dict[str, Tensor]:
        inputs, targets = (np.stack(values) for values in zip(*rows, strict=True))
        fields = {"input_ids": inputs, "targets": targets}
        if self.apart:
            fields["documents"], fields["positions"] = borders(inputs, self.tokens.eos)
        return {name: torch.from_numpy(values) for name, values in fields.items()}


def borders(ids: Ints, eos: int) -> tuple[Ints, Ints]:
    """Of every token of windows (B, T), the number of its document in the window and its position in it, from 0.

    A document begins with the `eos` that ended the one before: so its first token is predicted from that alone.
    """
    begins = ids == eos
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return begins.cumsum(1), place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)


def mapped(path: Path, tokens: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers of a file of a prepared folder, not read yet. Raises UsageError where its size is another."""
    got, expected = path.stat().st_size if path.is_file() else 0, tokens * dtype.itemsize
    if got != expected:
        raise UsageError(
            f"{path}: got {got:,} bytes, expected {expected:,}; delete the folder and prepare the data again"
        )
    return np.memmap(path, dtype, mode="r")
