"""The rows of a file, whatever its format: a text, no text, or what is wrong with it, each with its place.

Without a field a row is all that it holds, an object.
"""

import csv
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from optimizers.contract import UsageError

from .compressed import open_bytes
from .files import COLUMNS, WHOLE, kind, pyarrow

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Row(NamedTuple):
    """One row. Where there is no fault and no text, the row does not have the field; `fields` are those it has."""

    place: str
    text: str | None = None
    fault: str = ""
    fields: tuple[str, ...] = ()
    record: Mapping[str, Any] | None = None
    """All that the row holds, where no field was asked for."""


def rows(path: Path, field: str | None, header: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of a file: its `field`, or, with None, all of it (of a file of text, an object with "text"). `header`
    names the columns of a csv or tsv that has no first line with their names.

    Raises UsageError where the file as a whole is not understood, and what opening it does.
    """
    suffix = kind(path)
    if suffix in COLUMNS:
        yield from _columns(path, field, suffix)
        return
    with open_bytes(path) as file:
        if suffix in WHOLE:
            whole = _decoded(file.read())
            yield whole if field or whole.fault else whole._replace(record={"text": whole.text})
        elif suffix == ".json":
            yield from _json(file.read(), path, field)
        elif suffix in (".csv", ".tsv"):
            yield from _table(file, path, field, suffix, header)
        else:
            yield from _json_lines(file, field)


def _decoded(data: bytes, line: int = 0) -> Row:
    """Bytes as text, without the mark that some programs put before it; `line` is 0 for a whole file."""
    if line <= 1:
        if data.startswith(_UTF16):
            return Row("line 1", fault="not UTF-8 but UTF-16; convert the file to UTF-8")
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at = line or data.count(b"\n", 0, error.start) + 1
        return Row(f"line {at}", fault=f"not UTF-8 ({error.reason}); convert the file to UTF-8")
    if (nul := data.find(b"\0")) >= 0:
        at = line or data.count(b"\n", 0, nul) + 1
        return Row(f"line {at}", fault="holds a NUL byte, so it is UTF-16 or no text; convert the file to UTF-8")
    return Row(f"line {line or 1}", text)


def _parsed(text: str) -> tuple[Any, str]:
    """The value that a JSON text spells, or why it spells none."""
    try:
        return json.loads(text), ""
    except RecursionError:
        return None, "not JSON that can be read (nested too deep)"
    except ValueError as error:
        return None, f"not JSON ({error})"


def _json_lines(file: BinaryIO, field: str | None) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        row = _decoded(line, number)
        text = (row.text or "").strip()
        if row.fault:
            yield row
        elif text:
            value, fault = _parsed(text)
            yield (
                Row(row.place, fault=f"{fault}; expected one object a line") if fault else _of(value, row.place, field)
            )


def _json(data: bytes, path: Path, field: str | None) -> Iterator[Row]:
    """A list of objects or texts, an object that holds one as `data` or as the field, or an object a line."""
    whole = _decoded(data)
    text = (whole.text or "").strip()
    value, fault = _parsed(text) if text else (None, "")
    if whole.fault:
        yield whole
        return
    if "Extra data" in fault:
        yield from _json_lines(iter(data.splitlines(keepends=True)), field)  # type: ignore[arg-type]
        return
    if fault:
        raise UsageError(f"{path}: {fault}; expected a list of objects, an object with a list, or an object a line")
    if isinstance(value, dict):
        inner = value.get(field or "data", value.get("data"))
        value = inner if isinstance(inner, list) else [value]
    if text and not isinstance(value, list):
        raise UsageError(f"{path}: got {text[:60]!r}; expected a list of objects or of texts")
    for number, row in enumerate(value or (), start=1):
        place = f"row {number}"
        yield Row(place, row) if field and isinstance(row, str) else _of(row, place, field)


def _of(value: object, place: str, field: str | None) -> Row:
    """The row that a JSON value stands for."""
    if field is None:
        if isinstance(value, dict):
            return Row(place, record=value)
        return Row(place, fault=f"got {str(value)[:60]!r}; expected an object")
    wanted = f"expected an object whose field {field!r} is a string"
    if not isinstance(value, dict):
        return Row(place, fault=f"got {str(value)[:60]!r}; {wanted}")
    if field not in value:
        return Row(place, fields=tuple(value))
    text = value[field]
    return Row(place, text) if isinstance(text, str) else Row(place, fault=f"got {str(text)[:60]!r}; {wanted}")


def _table(file: BinaryIO, path: Path, field: str | None, suffix: str, named: Sequence[str] = ()) -> Iterator[Row]:
    """Comma-separated values with a header, quoted as in RFC 4180; or tab-separated ones, without any quoting."""
    csv.field_size_limit(sys.maxsize)
    tabs = suffix == ".tsv"
    faults: dict[int, str] = {}

    def lines() -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            row = _decoded(line, number)
            if row.fault:
                faults[number] = row.fault
            yield line.decode(errors="replace") if row.text is None else row.text

    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"delimiter": ","}
    reader = csv.reader(lines(), strict=True, **options)
    header = [*named]
    before = 0
    try:
        for cells in reader:
            place, before = f"line {before + 1}", reader.line_num
            wrong = next((faults.pop(n) for n in sorted(faults) if n <= before), "")
            if not header and wrong:
                raise UsageError(f"{path}, {place}: {wrong}")
            if not header:
                header = cells
                if field and header.count(field) != 1:
                    raise UsageError(f"{path}: got the columns {header}; expected one named {field!r} (--field)")
            elif wrong:
                yield Row(place, fault=wrong)
            elif len(cells) == len(header) and field:
                yield Row(place, cells[header.index(field)])
            elif len(cells) == len(header):
                yield Row(place, record=dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(place, fault=f"got {len(cells)} fields, expected {len(header)} as in the header")
    except csv.Error as error:
        reason = f"{error}; a quote that is never closed, or a damaged file"
        raise UsageError(f"{path}, line {before + 1}: {reason}") from None


def _columns(path: Path, field: str | None, suffix: str) -> Iterator[Row]:
    """One column of a parquet or an Arrow file, or all of them."""
    pyarrow(path)
    damage = importlib.import_module("pyarrow").ArrowException
    try:
        with open_bytes(path) as opened, _seekable(opened, path, suffix) as file:
            number = 0
            for column in (_parquet if suffix == ".parquet" else _arrow)(file, path, field):
                for value in _values(column):
                    number += 1
                    yield _cell(value, f"row {number}", field) if field else _record(value, f"row {number}")
    except (damage, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: not a{'n Arrow' if suffix == '.arrow' else ' parquet'} file, or damaged ({reason}); "
            "copy or download it again"
        ) from None


def _cell(value: object, place: str, field: str) -> Row:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Row(place, fault=f"not UTF-8 ({error.reason} at byte {error.start}) in column {field!r}")
    if isinstance(value, str):
        return Row(place, value)
    return Row(place, fault=f"got {str(value)[:60]}; expected a string in column {field!r}")


def _record(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return Row(place, record=value)
    return Row(place, fault="not UTF-8; write the file again")


def _values(column: Any) -> list[Any]:
    """The column's cells; strings that are not UTF-8 as bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_bytes_of(cell) for cell in column]


def _bytes_of(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return cell.as_buffer().to_pybytes() if hasattr(cell, "as_buffer") else None


def _seekable(file: BinaryIO, path: Path, suffix: str) -> BinaryIO:
    """The same content where one can jump back and forth, as reading columns must."""
    if path.suffix.lower() == suffix:
        return file
    copy: Any = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    while block := file.read(1 << 20):
        copy.write(block)
    copy.seek(0)
    return copy  # type: ignore[no-any-return]


def _parquet(file: BinaryIO, path: Path, field: str | None) -> Iterator[Any]:
    content = importlib.import_module("pyarrow.parquet").ParquetFile(file)
    _expect(content.schema_arrow.names, path, field)
    for batch in content.iter_batches(columns=[field] if field else None):
        yield batch.column(0) if field else batch.to_struct_array()


def _arrow(file: BinaryIO, path: Path, field: str | None) -> Iterator[Any]:
    ipc = importlib.import_module("pyarrow.ipc")
    try:
        content = ipc.open_file(file)
        batches = (content.get_batch(k) for k in range(content.num_record_batches))
    except ValueError:  # a stream, as `datasets` writes
        file.seek(0)
        content = ipc.open_stream(file)
        batches = iter(content)
    _expect(content.schema.names, path, field)
    for batch in batches:
        yield batch.column(field) if field else batch.to_struct_array()


def _expect(names: list[str], path: Path, field: str | None) -> None:
    if field and names.count(field) != 1:
        raise UsageError(f"{path}: got the columns {names}; expected one named {field!r} (--field)")
