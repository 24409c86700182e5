"""Sides that take turns, their ratios within a round, and a table of them that fits a terminal."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Sides = dict[str, Callable[[], object]]
Row = dict[str, Any]
Column = Mapping[str, str]  # the name of a figure in a row -> its heading, a word that a narrow table has room for


def timed(sides: Sides, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides taking turns, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, run in sides.items():
            start = clock()
            run()
            if i >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str, base: str) -> float:
    """Median over rounds of side / base."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[base], strict=True))


def report(title: str, rows: Sequence[Row], config: Any, shown: Column, notes: Sequence[str] = ()) -> None:
    """Print the `shown` figures of the rows as a table and what they mean below it; write all of them with the
    configuration to `config.json`, where that is a path."""
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(title)
    console.print(table(rows, shown))
    for note in notes:
        console.print(note)
    if config.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        content = {"torch": torch.__version__, "config": settings, "rows": rows}
        config.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], shown: Column) -> Table:
    """A row a side. In a narrow terminal the names of the sides are folded, figures and headings never."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    made.add_column("side", overflow="fold", min_width=12)
    for heading in shown.values():
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(row["side"], *(f"{v:.3g}" if isinstance(v := row[key], float) else str(v) for key in shown))
    return made
