"""Rows of figures, on disk as soon as they are there: a run that is cut has lost the row that it was at."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Measure = Callable[[], Row]


class Rows:
    """The figures of one run, until its time is up: `rows.jsonl`, a row a line, and `table.md`, the same to be read."""

    def __init__(self, out: Path, seconds: float, head: Row, say: Callable[[str], None] = print) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file, self.page, self._say = out / "rows.jsonl", out / "table.md", say
        self._end, self._head, self._rows = time.monotonic() + seconds, dict(head), list[dict[str, Any]]()
        self.file.write_text(json.dumps({"head": self._head}) + "\n", encoding="utf-8")

    def measure(self, table: str, name: str, measure: Measure) -> None:
        """One row of a table: what `measure` finds, or why it found nothing. Nothing is begun when the time is up."""
        row: dict[str, Any] = {"table": table, "name": name}
        began = time.monotonic()
        if began >= self._end:
            row["not measured"] = "the time was up"
        else:
            try:
                row |= measure()
            except Exception as error:  # the next row may have memory, or need nothing that is missing here
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        row["took s"] = round(time.monotonic() - began, 1)
        self._rows.append(row)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        self.page.write_text(page(self._head, self._rows), encoding="utf-8")
        self._say(", ".join(f"{key} {_short(value)}" for key, value in row.items()))


def page(head: Row, rows: list[dict[str, Any]]) -> str:
    """Markdown: what it was measured on, and a table for each `table` of the rows."""
    said = ["# Measured on a GPU", "", *(f"- {key}: {value}" for key, value in head.items())]
    for table in dict.fromkeys(row["table"] for row in rows):
        own = [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == table]
        heads = list(dict.fromkeys(key for row in own for key in row))
        said += ["", f"## {table}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        said += [f"| {' | '.join(_short(row.get(key, '')) for key in heads)} |" for row in own]
    return "\n".join(said) + "\n"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
