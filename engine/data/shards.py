"""The token files of one split, appended to and cut back to what is certain."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from optimizers.contract import UsageError

from ..atomic import naming

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
            with naming(Path(self._file.name)):
                self._file.write(ids[:room].astype(self.dtype).tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]
            if self.tokens % self.capacity == 0:
                self.close()

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        if self._file is not None:
            with naming(Path(self._file.name)):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self.sync()
        finally:  # after a sync that failed, closing would try again
            file, self._file = self._file, None
            with naming(Path(file.name)):
                file.close()

    def _file_name(self, k: int) -> str:
        return f"{self.name}-{k:05d}.bin"
