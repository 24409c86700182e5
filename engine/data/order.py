"""A pseudo-random order of the rows, new in each epoch, of which any place is found at once."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from optimizers.random import fold

ROUNDS = 6

Ints = npt.NDArray[np.int64]


class Epochs:
    """Rows 0 ... `rows - 1` in a new pseudo-random order each epoch, forever.

    The position is one integer, the rows consumed since the start of training: row i of the run is at place i % rows
    of epoch i // rows. Batches may straddle epochs, so none is short and no row is lost; unless epochs must begin with
    a batch of `align` rows: then each is filled up with blanks, numbered -1.
    """

    def __init__(self, rows: int, seed: int, align: int = 1) -> None:
        self.rows, self.seed = rows, seed
        self.length = -(-rows // align) * align  # positions in one

    def which(self, position: int, size: int) -> Ints:
        """The rows at `position`, ..., `position + size - 1`; int64 (size,)."""
        epoch, place = divmod(position, self.length)
        chosen: list[Ints] = []
        while size > 0:
            places = np.arange(place, min(place + size, self.length))
            real = places[places < self.rows]
            chosen += [order(self.seed, epoch, self.rows, real), np.full(len(places) - len(real), -1)]
            epoch, place, size = epoch + 1, 0, size - len(places)
        return np.concatenate(chosen)


def spaced(rows: int, limit: int | None) -> Ints:
    """At most `limit` of range(rows), evenly spaced and always the same ones, ascending; int64."""
    count = rows if limit is None else min(limit, rows)
    return (2 * np.arange(count, dtype=np.int64) + 1) * rows // (2 * max(count, 1))


def filled(rows: int, limit: int | None, size: int) -> Iterator[list[int]]:
    """The same numbers, or all, in lists of `size`; the last list is filled up with blanks, numbered -1."""
    chosen = spaced(rows, limit).tolist()
    for first in range(0, len(chosen), size):
        numbers = chosen[first : first + size]
        yield numbers + [-1] * (size - len(numbers))


def order(seed: int, epoch: int, n: int, positions: Ints) -> Ints:
    """The values at `positions` of a pseudo-random permutation of range(n) that (seed, epoch) alone determines.

    A Feistel network permutes the next larger power of four; a value outside of range(n) is sent through again until
    it falls inside ("cycle walking"). So no table is ever made, and any place is found at once.
    """
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = [np.uint64(fold(seed, "order", epoch, r)) for r in range(ROUNDS)]

    def permute(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << shift | right

    values = permute(np.asarray(positions).astype(np.uint64))
    while (outside := values >= n).any():
        values[outside] = permute(values[outside])
    return values.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
