"""The examples of one split of a prepared folder, and best-fit packing of examples into rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..order import Ints, order
from ..split import Side
from ..windows import mapped
from .prepare import COLUMNS, conversations_in
from .request import place


class Examples:
    """The examples of one split, memory-mapped. `fingerprint` is equal for equal tokens, masks and borders."""

    def __init__(self, folder: Path, split: Side = "train") -> None:
        """Raises UsageError for a folder that holds no conversations, or is damaged."""
        index = conversations_in(folder)
        made = index["splits"][split]
        self.folder, self.split = folder, split
        self.eos: int = index["tokenizer"]["eos"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.tokenizer: str = index["tokenizer"]["fingerprint"]
        self.format: str = index["format"]
        self.fingerprint: str = made["sha256"]
        self._files: list[str] = index["files"]
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._tokens = [mapped(folder / shard["file"], shard["tokens"], dtype) for shard in made["shards"]]
        self._masks = [mapped(folder / shard["file"], shard["tokens"], np.dtype("u1")) for shard in made["masks"]]
        tables = [mapped(folder / part["file"], part["tokens"], np.dtype("<i8")) for part in made["examples"]]
        table = np.concatenate(tables).reshape(-1, COLUMNS)
        self.sizes: Ints = table[:, 0].astype(np.int64)
        self.trained: Ints = table[:, 1].astype(np.int64)
        self._places = table[:, 2:]
        self._starts = np.cumsum([0, *self.sizes])
        self._shard_starts = np.cumsum([0] + [len(shard) for shard in self._tokens])

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, k: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Example k as ids (n,) int64, and whether each is trained (n,)."""
        start, stop = int(self._starts[k]), int(self._starts[k + 1])
        ids, mask = (self._read(shards, start, stop) for shards in (self._tokens, self._masks))
        return ids.astype(np.int64), mask.astype(np.bool_)

    def place(self, k: int) -> str:
        """Where example k stood, for messages."""
        file, number = self._places[k]
        return place(self._files[int(file)], int(number))

    def _read(self, shards: Sequence[npt.NDArray[Any]], start: int, stop: int) -> npt.NDArray[Any]:
        first, last = np.searchsorted(self._shard_starts, (start, stop - 1), side="right") - 1
        inside = [(shards[k], int(self._shard_starts[k])) for k in range(first, last + 1)]
        return np.concatenate([shard[max(start - at, 0) : stop - at] for shard, at in inside])


def best_fit(sizes: Sequence[int] | Ints, capacity: int, seed: int = 0) -> list[list[int]]:
    """The numbers of `sizes` in rows of at most `capacity`: the largest first, each into the fullest row that has room.

    Equal sizes come in an order that `seed` draws. No size may be above `capacity`. It takes O(n log capacity) steps.
    """
    lengths = np.asarray(sizes, np.int64)
    mixed = order(seed, 0, len(lengths), np.arange(len(lengths))) if len(lengths) else lengths
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by the room that they have left
    rooms: list[int] = []  # the keys of it, ascending
    for k in mixed[np.argsort(-lengths[mixed], kind="stable")].tolist():
        size = int(lengths[k])
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(at)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(k)
        if left := room - size:
            if left not in open_rows:
                insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows
