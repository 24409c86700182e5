"""Documents from files: what a corpus is, before it is tokens.

A `.txt` or `.py` file is one document, a `.jsonl` file has one a line (field `text`), a `.parquet` file one a row
(column `text`). All but parquet may be compressed. Nothing is normalised: a document is the text as it was written.
"""

import bz2
import glob
import gzip
import importlib
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from optimizers.core import UsageError

PLAIN = (".txt", ".py", ".jsonl")
COLUMNS = (".parquet",)
PACKED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
ACCEPTED = f"{' '.join(PLAIN)} (each also {' '.join(PACKED)}) and {' '.join(COLUMNS)}"

# Folders of the standard library that are tests, data tables, or a program's private parts rather than text to read.
_NOT_TEXT = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` (files, folders, glob patterns) stand for: paths in the order given, each sorted inside.

    A folder stands for every file below it that `documents` can read, but hidden ones. Raises UsageError for a path
    that stands for nothing, a file of another kind, or a file named twice.
    """
    files = [file for path in paths for file in _expand(Path(path).expanduser())]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UsageError(f"{file}: named twice; name every file once, by itself or by one folder or pattern")
        seen.add(file.resolve())
    return files


def documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order, but empty ones.

    Raises UsageError that names the file, and the line where there is one, for whatever keeps it from being read.
    """
    kind, empty = _kind(path), True
    read = {".jsonl": _lines, ".parquet": _rows}.get(kind, _whole)
    try:
        for text in read(path):
            if text:
                empty = False
                yield text
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path}: damaged or cut short ({error}); copy or download it again") from None
    except OSError as error:
        hint = "check the path and its permissions" if error.errno else "it is damaged: copy or download it again"
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from None
    if empty and kind != ".py":  # an empty Python module is as it should be, an empty corpus is a mistake
        raise UsageError(f"{path}: empty, expected at least one document with text; remove it or write it again")


def standard_library() -> list[Path]:
    """The Python sources of the standard library that runs this, without tests and tables: a corpus always at hand."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name for name in names if not _NOT_TEXT & set(name.parts) and not name.name.startswith("_sysconfig")]
    if not names:
        raise UsageError(f"{root}: this Python has no sources of its library; name the text to train on with --data")
    return [root / name for name in sorted(names, key=lambda name: name.as_posix())]


def _expand(path: Path) -> list[Path]:
    if path.is_file():
        if _kind(path) not in PLAIN + COLUMNS:
            raise UsageError(f"{path}: not a kind of file that can be read; expected {ACCEPTED}")
        return [path]
    if path.is_dir():
        below = sorted(path.rglob("*"))
        shown = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        found = [file for file in shown if _kind(file) in PLAIN + COLUMNS and file.is_file()]
        if not found:
            raise UsageError(f"{path}: nothing to read in this folder; expected files that end in {ACCEPTED}")
        return found
    if glob.has_magic(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise UsageError(f"{path}: this pattern matches no file; check it, and that the shell leaves it alone")
        return [file for match in matches if match.is_file() for file in _expand(match)]
    raise UsageError(f"{path}: no such file or folder; expected a file, a folder or a glob pattern")


def _kind(path: Path) -> str:
    """`.jsonl` for `a.jsonl` and for `a.jsonl.xz`; empty where the two suffixes do not go together."""
    last = path.suffix.lower()
    if last not in PACKED:
        return last
    inner = Path(path.stem).suffix.lower()
    return inner if inner in PLAIN else ""


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, PACKED.get(path.suffix.lower(), open)(path, "rb"))


def _whole(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield _decode(file.read(), path)


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, number).strip()
            if not text:
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                got = f"the fields {sorted(row)}" if isinstance(row, dict) and "text" not in row else f"{text[:60]!r}"
                raise UsageError(f"{path}, line {number}: got {got}; expected an object whose field 'text' is a string")
            yield _writable(row["text"], f"{path}, line {number}")


def _rows(path: Path) -> Iterator[str]:
    try:
        file = importlib.import_module("pyarrow.parquet").ParquetFile(path)
    except ImportError:
        raise UsageError(f"{path}: parquet needs pyarrow, which is missing: pip install 'leanstep[data]'") from None
    except ValueError as error:
        raise UsageError(f"{path}: not a parquet file ({error}); copy or download it again") from None
    with file:
        if "text" not in file.schema_arrow.names:
            raise UsageError(f"{path}: got the columns {file.schema_arrow.names}; expected one named 'text'")
        number = 0
        for batch in file.iter_batches(columns=["text"]):
            for value in batch.column(0):
                text, number = value.as_py(), number + 1
                if not isinstance(text, str):
                    raise UsageError(f"{path}, row {number}: got {text!r:.60}; expected a string in column 'text'")
                yield text


def _decode(data: bytes, path: Path, line: int = 0) -> str:
    try:
        return (data if line > 1 else data.removeprefix(b"\xef\xbb\xbf")).decode()
    except UnicodeDecodeError as error:
        line = line or data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _writable(text: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: half a surrogate pair at character {error.start}; write it as UTF-8") from None
    return text
