"""Files that may be compressed, as streams of bytes. A stream that is cut short is an error, never a short text."""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from optimizers.contract import UsageError

SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)  # what reading a damaged stream raises

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, uncompressed. Raises UsageError where what is needed to read it is missing."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(path), 1 << 17))
    return cast(BinaryIO, _OPEN.get(suffix, open)(path, "rb"))


def zstandard(path: Path) -> Any:
    """The module that reads .zst: of the standard library from Python 3.14 on, else a package."""
    for name in ("compression.zstd", "zstandard"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UsageError(
        f"{path}: .zst needs Python 3.14 or the package zstandard, which is missing: pip install 'leanstep[data]'"
    )


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file, one after the other. `zstandard`'s own reader takes a cut stream for a whole one."""

    def __init__(self, path: Path) -> None:
        self._module = zstandard(path)
        self._file = path.open("rb")
        self._frame: Any = None
        self._left = b""  # compressed bytes that no frame has taken yet
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._left or self._file.read(1 << 17)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except Exception as error:  # each module has an error of its own
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _new_frame(self) -> Any:
        named = self._module.ZstdDecompressor()
        return named.decompressobj() if hasattr(named, "decompressobj") else named
