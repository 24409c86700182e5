"""Batches of packed examples: rows of one length that know where each document begins."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.segment import IGNORED
from optimizers.contract import UsageError

from ..losses import several
from ..order import Epochs, Ints, filled
from .reader import Examples, best_fit

Longer = Literal["refuse", "cut", "leave-out"]
EIGHTHS = 8  # supervised tokens of a row are filled up to a multiple of an eighth of it


@dataclass(frozen=True)
class Fit:
    """How examples fit into rows of `sequence` targets; all of `examples` are numbers of examples."""

    kept: tuple[int, ...]
    cut: int
    """Of those, how many are cut to the sequence."""
    left_out: int
    tokens: int
    """Tokens of the examples that are not there, cut or left out."""

    def in_words(self, sequence: int) -> str:
        """One line; empty where every example fits."""
        if not (self.cut or self.left_out):
            return ""
        parts = [f"{several(self.cut, 'example')} cut"] if self.cut else []
        parts += [f"{several(self.left_out, 'example')} left out"] if self.left_out else []
        return f"longer than {sequence:,} tokens: {', '.join(parts)} ({several(self.tokens, 'token')} not trained on)"


def fit(examples: Examples, sequence: int, longer: Longer = "refuse") -> Fit:
    """Which examples go into rows of `sequence`: an example of n tokens takes n - 1 places, as its last is a target
    only. Raises UsageError for a longer one (unless it is cut or left out), and for one of which no trained token is
    left, with its place."""
    if sequence < 1:
        raise UsageError(f"sequence length: got {sequence}; expected at least 1")
    long = np.flatnonzero(examples.sizes - 1 > sequence)
    if len(long) and longer == "refuse":
        worst = int(long[examples.sizes[long].argmax()])
        raise UsageError(
            f"{several(len(long), 'example')} of {len(examples):,} longer than the sequence of {sequence:,} tokens; "
            f"the longest, {examples.place(worst)}, has {examples.sizes[worst]:,}: use a longer --sequence, or "
            "--longer cut or leave-out"
        )
    over = int((examples.sizes[long] - 1 - sequence).sum())
    if longer == "leave-out":
        kept = np.setdiff1d(np.arange(len(examples)), long)
        if not len(kept):
            whose = "held-out example" if examples.split == "validation" else "example"
            more = ", or hold out more (--validation-fraction, --validation)" if examples.split == "validation" else ""
            raise UsageError(f"every {whose} is longer than {sequence:,} tokens; use a longer --sequence{more}")
        return Fit(tuple(kept.tolist()), 0, len(long), int(examples.sizes[long].sum()))
    for k in long.tolist():
        if not examples.read(k)[1][: sequence + 1].any():
            raise UsageError(
                f"{examples.place(k)}: cut to {sequence:,} tokens, of which none is trained; use a longer --sequence, "
                "or --longer leave-out"
            )
    return Fit(tuple(range(len(examples))), len(long), 0, over)


class Packed:
    """Rows of `sequence` tokens, in a new pseudo-random order each epoch, forever: see `Epochs`.

    Rows hold whole examples by best fit, or, without `pack`, one example each. What is left of a row is filled with
    `eos`, as a document of its own without any target.
    """

    def __init__(
        self,
        examples: Examples,
        sequence: int,
        seed: int = 0,
        align: int = 1,
        *,
        longer: Longer = "refuse",
        pack: bool = True,
    ) -> None:
        """Raises UsageError where `fit` does."""
        self.examples, self.sequence = examples, sequence
        self.fit = fit(examples, sequence, longer)
        kept = np.array(self.fit.kept, np.int64)
        sizes = np.minimum(examples.sizes[kept] - 1, sequence)
        packed = best_fit(sizes, sequence, seed) if pack else [[k] for k in range(len(kept))]
        self.rows = [kept[row] for row in packed]
        self.filled = float(sizes.sum() / (len(self.rows) * sequence))
        self.epochs = Epochs(len(self.rows), seed, align)

    def in_words(self) -> str:
        """How examples fill the rows, and what was cut."""
        trained = self.examples.trained.sum() / self.examples.sizes.sum()
        cut = self.fit.in_words(self.sequence)
        rows = f"{several(len(self.rows), 'row')} of {self.sequence:,} tokens"
        return (
            f"{several(len(self.fit.kept), 'example')} in {rows}; "
            f"{self.filled:.1%} of them filled, {trained:.1%} of that trained" + (f"; {cut}" if cut else "")
        )

    def batch(self, position: int, size: int) -> dict[str, Tensor]:
        """The rows at `position`, ..., `position + size - 1`: int64 (size, sequence) `input_ids`, `targets` (shifted
        already; IGNORED where nothing is trained), `positions` (from 0 in each document), `documents` (a number for
        each, from 0 in each row), and `supervised` (size, k): the places of the row's targets, filled up with places
        of IGNORED ones to a multiple of an eighth of the sequence."""
        return _stack([self._row(int(k)) for k in self.epochs.which(position, size)])

    def evaluation(self, size: int, limit: int | None = None) -> Iterator[dict[str, Tensor]]:
        """`limit` rows (all by default), evenly spaced and always the same ones, as batches like `batch`'s. The last
        batch is filled up with rows without any target."""
        for numbers in filled(len(self.rows), limit, size):
            yield _stack([self._row(k) for k in numbers])

    def _row(self, k: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Row k as input_ids, targets, positions and documents, (sequence,) each; -1 is a blank."""
        inputs, targets = np.full(self.sequence, self.examples.eos), np.full(self.sequence, IGNORED)
        positions, documents = np.arange(self.sequence), np.zeros(self.sequence, np.int64)
        at = 0
        for n, example in enumerate(self.rows[k] if k >= 0 else ()):
            ids, trained = self.examples.read(int(example))
            ids, trained = ids[: self.sequence + 1], trained[: self.sequence + 1]
            here = slice(at, at + len(ids) - 1)
            inputs[here] = ids[:-1]
            targets[here] = np.where(trained[1:], ids[1:], IGNORED)
            at = here.stop
            positions[at:] = np.arange(self.sequence - at)
            documents[at:] = n + 1
        return inputs, targets, positions, documents


def _stack(rows: list[tuple[Ints, Ints, Ints, Ints]]) -> dict[str, Tensor]:
    names = ("input_ids", "targets", "positions", "documents")
    fields = {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    fields["supervised"] = supervised(fields["targets"])
    return {name: torch.from_numpy(values) for name, values in fields.items()}


def supervised(targets: npt.NDArray[np.int64]) -> Ints:
    """The places of each row's targets that are not IGNORED, ascending, then of those that are: int64 (B, k), k the
    greatest count of targets in a row, filled up to a multiple of an eighth of the row."""
    sequence = targets.shape[1]
    unit = max(-(-sequence // EIGHTHS), 1)
    ignored = targets == IGNORED
    most = int((~ignored).sum(1).max())
    size = min(max(-(-most // unit), 1) * unit, sequence)
    return np.argsort(ignored, axis=1, kind="stable")[:, :size].astype(np.int64)
