"""Compare optimizers fairly: same model, data, schedule and token budget; each learning rate tuned; several seeds.

    python -m recipes.compare OUT \\
        --methods "adamw @ 5e-4,1e-3,2e-3,4e-3 = baseline --optimizer adamw" \\
                  "snsm @ 5e-3,1e-2,2e-2,4e-2 = snsm demo --rest-lr 2e-3" \\
        --seeds 0 1 -- --data corpus --steps 1000

What follows the lone -- goes to every run: model, data, steps and so on.

A method is `name @ learning rates = recipe and its flags`. Every rate runs with the first seed; the best of them also
runs with the others. A cell is one run of a recipe in a process of its own; finished ones are kept in OUT/cells.json
and never run twice, so a comparison can be stopped and started again, and widened later.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.atomic import write_whole
from engine.checkpoint.lock import claim
from engine.curves import loss_curve
from engine.loop.metrics import read, series
from engine.terminal.attempt import attempt
from engine.terminal.command import module
from engine.terminal.flags import ask
from engine.terminal.output import lasting, printable
from optimizers.contract import UsageError
from optimizers.random import fold

CELLS = "cells.json"
LOSS = "eval/loss"
Cell = dict[str, Any]


@dataclass(frozen=True)
class Compare:
    out: tyro.conf.Positional[Path]
    """Folder of the comparison: cells.json, table.md, curves.png and a folder for each run."""
    methods: tuple[str, ...]
    """Each "name @ lr,lr,... = recipe and its flags"."""
    seeds: tuple[int, ...] = (0,)
    """The first tunes the learning rate; the best rate runs with all of them."""
    reference: str = ""
    """The method whose final loss the others' steps are counted to; by default the first."""
    metric: str = LOSS
    """What is compared: any metric that the runs' evaluations write into their metrics.jsonl, such as eval/accuracy."""
    best: Literal["lowest", "highest"] = "lowest"
    """Which values of the metric are good ones."""
    title: str = ""
    """Of the picture; by default the metric."""

    @property
    def label(self) -> str:
        return "held-out loss" if self.metric == LOSS else self.metric

    @property
    def sign(self) -> int:
        """Times this, less is better."""
        return 1 if self.best == "lowest" else -1


class Method(NamedTuple):
    name: str
    rates: list[float]
    command: list[str]


def parse(text: str) -> Method:
    """A method from its one-line form. Raises UsageError."""
    head, equals, command = text.partition("=")
    name, at, rates = head.partition("@")
    try:
        method = Method(name.strip(), [float(r) for r in rates.split(",")], shlex.split(command))
    except ValueError:
        method = Method("", [], [])
    if not (equals and at and method.name and method.command):
        raise UsageError(f'method {text!r}: expected "name @ lr,lr = recipe and its flags"')
    return method


def run(config: Compare, common: list[str], method: Method, lr: float, seed: int, console: Console) -> Cell:
    """One cell: from the file if it is there, else by running it. A run that diverged counts as an infinite loss."""
    command = [*method.command, *common]
    key = shlex.join([*command, "--lr", f"{lr:g}", "--seed", str(seed)])
    if key in (cells := load(config.out)):
        return cells[key]
    folder = config.out / "runs" / f"{method.name}-lr{lr:g}-seed{seed}-{fold(0, key) % 16**6:06x}"
    flags = ["--lr", str(lr), "--seed", str(seed), "--out", str(folder), "--resume", "auto"]
    console.print(f"{method.name}  lr {lr:g}  seed {seed}", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = [sys.executable, "-m", module(f"recipes.{command[0]}"), *command[1:], *flags]
        spoken = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # whatever this terminal knows
        code = subprocess.run(process, stdout=log, stderr=subprocess.STDOUT, env=spoken, check=False).returncode
    cell: Cell = {"method": method.name, "lr": lr, "seed": seed, "loss": math.inf, "curve": []}
    if code == 0:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        cell |= {"loss": result[LOSS], "curve": curve(folder, LOSS)}
        names = {name: None for record in read(folder) for name in record if name.startswith("eval/")}
        cell["curves"] = {name: curve(folder, name) for name in names if name != LOSS}
        cell |= {k: result[k] for k in ("steps", "tokens", "state_bytes", "seconds_per_step") if k in result}
    elif code != 4:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UsageError(f"{key}: exit code {code}: {lines[-1] if lines else 'no output'}; see {folder / 'log.txt'}")
    console.print(f"    {config.label} {last(cell, config):.4f}", highlight=False)
    save(config.out, {**load(config.out), key: cell})  # others may have been run beside it
    return cell


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric of one run."""
    return list(zip(*series(folder, metric), strict=True))


def points(cell: Cell, metric: str) -> list[Sequence[float]]:
    """(step, value) of a finished cell; none of a run that diverged. Raises UsageError where the run has none."""
    known = {LOSS: cell["curve"], **cell.get("curves", {})}
    if math.isfinite(cell["loss"]) and not known.get(metric):
        raise UsageError(f"--metric {metric!r}: the runs of {cell['method']} have {', '.join(known)}")
    return known.get(metric, [])


def last(cell: Cell, config: Compare) -> float:
    """The metric at the end of a run; the worst there is where it diverged, or the metric is not a number."""
    if not math.isfinite(cell["loss"]):
        return math.inf * config.sign
    value = cell["loss"] if config.metric == LOSS else points(cell, config.metric)[-1][1]
    return math.inf * config.sign if math.isnan(value) else value


def load(out: Path) -> dict[str, Cell]:
    """Finished cells by the command that makes them; a loss of null is a run that diverged."""
    path = out / CELLS
    try:
        cells: dict[str, Cell] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: damaged ({error}); repair it, or move it away to run every cell again") from None
    return {k: c | {"loss": math.inf if c["loss"] is None else c["loss"]} for k, c in cells.items()}


def save(out: Path, cells: dict[str, Cell]) -> None:
    """Replace the file at once, so that a kill leaves the old or the new one."""
    plain = {k: c | {"loss": c["loss"] if math.isfinite(c["loss"]) else None} for k, c in cells.items()}
    write_whole(out / CELLS, json.dumps(plain, indent=1) + "\n")


def steps_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """Steps until a curve of (step, loss) first reaches `target`, interpolated between evaluations."""
    before: Sequence[float] | None = None
    for step, loss in curve:
        if loss <= target:
            return step if before is None else step - (step - before[0]) * (target - loss) / (before[1] - loss)
        before = step, loss
    return None


class Row(NamedTuple):
    name: str
    lr: float
    edge: bool  # the best rate is the lowest or the highest of those tried
    cells: list[Cell]


def columns(config: Compare, rows: Sequence[Row], reference: str) -> list[list[str]]:
    """The comparison: the headings, then a row per method."""
    ends = {row.name: [last(cell, config) for cell in row.cells] for row in rows}
    target, sign = statistics.mean(ends[reference]), config.sign
    final = "final loss" if config.metric == LOSS else f"final {config.metric}"
    found = [
        ["method", "best lr", f"{config.label}, mean ± sd", f"steps to {reference}'s {final}", "state MB", "s/step"]
    ]
    for row in rows:
        values = ends[row.name]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 and all(map(math.isfinite, values)) else ""
        signed = [[(step, sign * value) for step, value in points(cell, config.metric)] for cell in row.cells]
        reached = [steps_to(one, sign * target) for one in signed]
        total = row.cells[0].get("steps", 0)
        steps = [s for s in reached if s is not None]
        count = f"{statistics.mean(steps):.0f} ({statistics.mean(steps) / total:.2f})" if steps else "not reached"
        partial = f", {len(steps)} of {len(reached)} seeds" if steps and len(steps) < len(reached) else ""
        seconds = row.cells[0].get("seconds_per_step")  # none where a run was too short to tell
        cost = [f"{row.cells[0].get('state_bytes', 0) / 1e6:.1f}", "-" if seconds is None else f"{seconds:.2f}"]
        lr = f"{row.lr:g}" + (" (edge)" if row.edge else "")
        mean = f"{statistics.mean(values):.4f}{spread} (n={len(values)})"
        found.append([row.name, lr, mean, count + partial, *cost])
    return found


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Headings and rows as a Markdown table."""
    head, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *rows]) + "\n"


def rates(tried: dict[str, list[tuple[float, float]]]) -> str:
    """What every learning rate of the first seed came to."""
    lines = ["Learning rates tried with the first seed:", ""]
    for name, pairs in tried.items():
        lines.append(f"- {name}: " + ", ".join(f"{lr:g} → {value:.4f}" for lr, value in pairs))
    return "\n".join(lines) + "\n"


def narrow(cells: Sequence[Sequence[str]]) -> Table:
    """Headings and rows for a terminal: headings and names give way, figures do not."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    words = [max(len(word) for row in cells[1:] for word in row[i].split(" ")) for i in range(len(cells[0]))]
    for i, heading in enumerate(cells[0]):
        made.add_column(heading, justify="right" if i else "left", overflow="fold", min_width=words[i] if i else 6)
    for row in cells[1:]:
        made.add_row(*row)
    return made


def compare(config: Compare, common: list[str], console: Console) -> None:
    """Run what is missing, each with `common` flags, then write table.md and curves.png. Raises UsageError."""
    methods = [parse(text) for text in config.methods]
    reference = config.reference or methods[0].name
    if reference not in [m.name for m in methods]:
        raise UsageError(f"--reference {reference!r} is none of {[m.name for m in methods]}")
    from .registry import parsed  # slow to import

    for method in methods:  # before the first of them trains
        parsed([*method.command, *common, "--lr", "1", "--seed", "0"], "--methods")
    with claim(config.out, console.print, "OUT"):
        _compare(config, common, methods, reference, console)


def _compare(config: Compare, common: list[str], methods: list[Method], reference: str, console: Console) -> None:
    """In a folder that is this process's own."""
    rows, tried = [], {}
    for method in methods:
        tuning = [
            (lr, last(run(config, common, method, lr, config.seeds[0], console), config)) for lr in sorted(method.rates)
        ]
        tried[method.name] = tuning
        best = min(tuning, key=lambda pair: config.sign * pair[1])[0]
        cells = [run(config, common, method, best, seed, console) for seed in config.seeds]
        rows.append(Row(method.name, best, len(tuning) > 1 and best in (tuning[0][0], tuning[-1][0]), cells))
    cells_of, text_of = columns(config, rows, reference), rates(tried)
    text = f"{markdown(cells_of)}\n{text_of}"
    curves = {row.name: average(drawn) for row in rows if all(drawn := [points(c, config.metric) for c in row.cells])}
    unit = (
        "nats per token"
        if config.metric == LOSS and all("tokens" in c for r in rows for c in r.cells)
        else config.label
    )
    table, title = config.out / "table.md", config.title or config.label

    def written() -> str:
        write_whole(table, text.encode("utf-8", "backslashreplace").decode())
        return str(table)

    def drawn_over() -> str:
        return str(loss_curve(config.out / "curves.png", {}, title, unit, held_out=curves))

    if console.is_terminal:
        console.print(narrow(cells_of), soft_wrap=False)
        console.print(text_of, highlight=False)
    else:
        console.print(text, highlight=False)
    for name, line in (
        ("table", attempt(written, "written")),
        ("picture", attempt(drawn_over, "drawn")),
        ("cells", str(config.out / CELLS)),
    ):
        console.print(f"{name:8} {line}", highlight=False)


def average(curves: Sequence[Sequence[Sequence[float]]]) -> tuple[list[int], list[float]]:
    """The mean curve over seeds."""
    steps = [int(step) for step, _ in curves[0]]
    return steps, [statistics.mean(values) for values in zip(*([y for _, y in one] for one in curves), strict=True)]


if __name__ == "__main__":
    printable()
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    with lasting():
        try:
            config = ask(lambda prog: tyro.cli(Compare, prog=prog, args=sys.argv[1:end], description=__doc__))
            compare(config, sys.argv[end + 1 :], Console(soft_wrap=True, markup=False, emoji=False))
        except (UsageError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
