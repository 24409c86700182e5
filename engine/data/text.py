"""Documents from files: what a corpus is, before it is tokens.

A text file is one document; a file of rows (JSON, CSV, parquet, Arrow) has one a row, in the field that is asked for.
Nothing is normalised: a document is the text as it was written.

A row without the field and an empty text are no document: they are counted. A malformed row (not UTF-8, not JSON, a
field that is no text, half a surrogate pair) is an error, or counted where that is allowed. A damaged file is an error.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optimizers.contract import UsageError

from .compressed import DAMAGE
from .files import kind
from .rows import Row, rows

# Folders of the standard library that are tests, data tables, or a program's private parts rather than text to read.
_NOT_TEXT = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"}


@dataclass
class Passed:
    """Rows that gave no document, counted over any number of files."""

    rows: int = 0
    """All rows, with those that gave one."""
    without: int = 0
    empty: int = 0
    malformed: int = 0
    first_without: str = ""
    first_malformed: str = ""

    def in_words(self, field: str) -> str:
        """One line; empty where every row gave a document."""
        parts = []
        if self.without:
            parts.append(f"{self.without:,} have no field {field!r} (the first: {self.first_without})")
        if self.empty:
            parts.append(f"{self.empty:,} are empty")
        if self.malformed:
            parts.append(f"{self.malformed:,} are malformed and left out (the first: {self.first_malformed})")
        return f"of {self.rows:,} rows {'; '.join(parts)}" if parts else ""


def documents(
    path: Path, field: str = "text", passed: Passed | None = None, skip_malformed: bool = False
) -> Iterator[str]:
    """The documents of one file, in order; what gives none is counted in `passed`.

    Raises UsageError that names the file, and the row where there is one, for whatever keeps it from being read, for a
    malformed row unless those are skipped, and for a file without any document.
    """
    passed = Passed() if passed is None else passed
    lacking: Row | None = None
    found = False
    for row in reading(path, field):
        passed.rows += 1
        fault = row.fault or unwritable(row.text or "")
        if fault and not skip_malformed:
            raise UsageError(f"{path}, {row.place}: {fault}")
        if fault:
            passed.malformed += 1
            passed.first_malformed = passed.first_malformed or f"{path.name}, {row.place}: {fault}"
        elif row.text is None:
            passed.without += 1
            passed.first_without = passed.first_without or f"{path.name}, {row.place}"
            lacking = lacking or row
        elif row.text:
            found = True
            yield row.text
        else:
            passed.empty += 1
    if found or kind(path) == ".py":  # an empty Python module is as it should be, an empty corpus is a mistake
        return
    if lacking:
        raise UsageError(
            f"{path}, {lacking.place}: got the fields {sorted(lacking.fields)}; expected an object whose field "
            f"{field!r} is a string, here or in another row: name the field with --field"
        )
    raise UsageError(f"{path}: empty, expected at least one document with text; remove it or write it again")


def reading(path: Path, field: str | None) -> Iterator[Row]:
    """The rows of a file (see `rows`). Raises UsageError that names the file also for damage found on the way."""
    try:
        yield from rows(path, field)
    except DAMAGE as error:
        raise UsageError(f"{path}: damaged or cut short ({error}); copy or download it again") from None
    except OSError as error:
        hint = "check the path and its permissions" if error.errno else "it is damaged: copy or download it again"
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from None


def standard_library() -> list[Path]:
    """The Python sources of the standard library that runs this, without tests and tables: a corpus always at hand."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name for name in names if not _NOT_TEXT & set(name.parts) and not name.name.startswith("_sysconfig")]
    if not names:
        raise UsageError(f"{root}: this Python has no sources of its library; name the text to train on with --data")
    return [root / name for name in sorted(names, key=lambda name: name.as_posix())]


def unwritable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair at character {error.start}; write it as UTF-8"
    return ""
