"""Files that an interruption cannot spoil: whole or not at all, and one writer at a time."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from optimizers.core import UsageError

Table = list[dict[str, Any]]  # files and the tokens in each, as the index of a prepared folder lists them


class Shards:
    """The files of one split, open at their end. What lies beyond `tokens` is cut off first."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], capacity: int, tokens: int) -> None:
        self.folder, self.name, self.dtype, self.capacity, self.tokens = folder, name, dtype, capacity, tokens
        self._file: BinaryIO | None = None
        expected = {shard["file"]: shard["tokens"] * dtype.itemsize for shard in self.table()}
        for file, size in expected.items():
            path = folder / file
            if not path.is_file() or path.stat().st_size < size:
                raise UsageError(
                    f"{path}: shorter than it was, expected {size:,} bytes; delete {folder} and start again"
                )
            os.truncate(path, size)
        for path in folder.glob(f"{name}-*.bin"):
            if path.name not in expected:
                path.unlink()

    def table(self) -> Table:
        starts = range(0, self.tokens, self.capacity)
        return [
            {"file": self._file_name(k), "tokens": min(self.capacity, self.tokens - start)}
            for k, start in enumerate(starts)
        ]

    def append(self, ids: npt.NDArray[Any]) -> None:
        while len(ids):
            if self._file is None:
                self._file = (self.folder / self._file_name(self.tokens // self.capacity)).open("ab")
            room = self.capacity - self.tokens % self.capacity
            self._file.write(ids[:room].astype(self.dtype).tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]
            if self.tokens % self.capacity == 0:
                self.close()

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _file_name(self, k: int) -> str:
        return f"{self.name}-{k:05d}.bin"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all, even when the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(files: Iterable[Path]) -> str:
    """The hash of the files' bytes, one after the other."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


@contextmanager
def alone(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Keep other processes out of a folder; one that comes later says so with `waiting` and waits.

    The system lets go of the folder however the process ends. On Windows nothing keeps processes apart.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which also unlocks it
