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

_STREAMS: dict[str, Callable[[], Any]] = {".xz": lzma.LZMADecompressor, ".bz2": bz2.BZ2Decompressor}


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, uncompressed. Raises UsageError where what is needed to read it is missing."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_Zstandard(path), 1 << 17))
    if suffix in _STREAMS:
        return cast(BinaryIO, io.BufferedReader(_Streams(path, _STREAMS[suffix]), 1 << 17))
    return cast(BinaryIO, gzip.open(path, "rb") if suffix == ".gz" else path.open("rb"))


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


class _Streams(io.RawIOBase):
    """The .xz or .bz2 streams of a file, one after the other, as parallel compressors write them. The library's own
    readers take a later stream that is damaged at its beginning for the end of the file."""

    def __init__(self, path: Path, begin: Callable[[], Any]) -> None:
        self._file, self._begin = path.open("rb"), begin
        self._stream: Any = begin()
        self._fresh = True  # nothing of this stream has been read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while True:
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")  # padding between streams
                self._stream, self._fresh = self._begin(), True
            if not data and self._stream.needs_input and not (data := self._file.read(1 << 17)):
                if self._fresh and self._file.tell():
                    return 0
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if self._fresh and not (data := data.lstrip(b"\0")):
                continue
            self._fresh = False
            try:
                found = self._stream.decompress(data, len(buffer))
            except OSError as error:  # what the library raises for damage, as if the disk had failed
                raise EOFError(str(error)) from None
            data = b""
            if found:
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


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
