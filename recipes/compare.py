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
from typing import Any, NamedTuple

import tyro
from rich.console import Console

from engine.checkpoint.lock import claim
from engine.curves import loss_curve
from engine.durable import write_whole
from engine.flags import ask
from engine.output import printable
from optimizers.contract import UsageError
from optimizers.random import fold

CELLS = "cells.json"
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
    title: str = "held-out loss"
    """Of the picture."""


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
        process = [sys.executable, "-m", f"recipes.{command[0]}", *command[1:], *flags]
        spoken = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # whatever this terminal knows
        code = subprocess.run(process, stdout=log, stderr=subprocess.STDOUT, env=spoken, check=False).returncode
    cell: Cell = {"method": method.name, "lr": lr, "seed": seed, "loss": math.inf, "curve": []}
    if code == 0:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        cell |= {"loss": result["eval/loss"], "curve": result["curve"]}
        cell |= {k: result[k] for k in ("steps", "tokens", "state_bytes", "seconds_per_step")}
    elif code != 4:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UsageError(f"{key}: exit code {code}: {lines[-1] if lines else 'no output'}; see {folder / 'log.txt'}")
    console.print(f"    held-out loss {cell['loss']:.4f}", highlight=False)
    save(config.out, {**load(config.out), key: cell})  # others may have been run beside it
    return cell


def load(out: Path) -> dict[str, Cell]:
    """Finished cells by the command that makes them; a loss of null is a run that diverged."""
    path = out / CELLS
    cells: dict[str, Cell] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
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

    @property
    def losses(self) -> list[float]:
        return [cell["loss"] for cell in self.cells]


def table(rows: Sequence[Row], reference: str, tried: dict[str, list[tuple[float, float]]]) -> str:
    """The comparison as Markdown."""
    target = statistics.mean(next(row for row in rows if row.name == reference).losses)
    lines = [
        f"| method | best lr | held-out loss, mean ± sd | steps to {reference}'s final loss | state MB | s/step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {statistics.stdev(row.losses):.4f}" if len(row.losses) > 1 else ""
        reached = [steps_to(cell["curve"], target) for cell in row.cells]
        total = row.cells[0].get("steps", 0)
        steps = [s for s in reached if s is not None]
        count = f"{statistics.mean(steps):.0f} ({statistics.mean(steps) / total:.2f})" if steps else "not reached"
        partial = f", {len(steps)} of {len(reached)} seeds" if steps and len(steps) < len(reached) else ""
        cost = [f"{row.cells[0].get('state_bytes', 0) / 1e6:.1f}", f"{row.cells[0].get('seconds_per_step', 0):.2f}"]
        lr = f"{row.lr:g}" + (" (edge)" if row.edge else "")
        mean = f"{statistics.mean(row.losses):.4f}{spread} (n={len(row.losses)})"
        lines.append(f"| {row.name} | {lr} | {mean} | {count}{partial} | {cost[0]} | {cost[1]} |")
    lines += ["", "Learning rates tried with the first seed:", ""]
    for name, pairs in tried.items():
        lines.append(f"- {name}: " + ", ".join(f"{lr:g} → {loss:.4f}" for lr, loss in pairs))
    return "\n".join(lines) + "\n"


def compare(config: Compare, common: list[str], console: Console) -> None:
    """Run what is missing, each with `common` flags, then write table.md and curves.png. Raises UsageError."""
    methods = [parse(text) for text in config.methods]
    reference = config.reference or methods[0].name
    if reference not in [m.name for m in methods]:
        raise UsageError(f"--reference {reference!r} is none of {[m.name for m in methods]}")
    with claim(config.out, console.print, "OUT"):
        _compare(config, common, methods, reference, console)


def _compare(config: Compare, common: list[str], methods: list[Method], reference: str, console: Console) -> None:
    """In a folder that is this process's own."""
    rows, tried = [], {}
    for method in methods:
        tuning = [
            (lr, run(config, common, method, lr, config.seeds[0], console)["loss"]) for lr in sorted(method.rates)
        ]
        tried[method.name] = tuning
        best = min(tuning, key=lambda pair: pair[1])[0]
        cells = [run(config, common, method, best, seed, console) for seed in config.seeds]
        rows.append(Row(method.name, best, len(tuning) > 1 and best in (tuning[0][0], tuning[-1][0]), cells))
    text = table(rows, reference, tried)
    (config.out / "table.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    curves = {row.name: average(row.cells) for row in rows if row.cells[0]["curve"]}
    loss_curve(config.out / "curves.png", {}, config.title, "nats per token", held_out=curves)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{config.out / 'table.md'}  {config.out / 'curves.png'}  {config.out / CELLS}", highlight=False)


def average(cells: Sequence[Cell]) -> tuple[list[int], list[float]]:
    """The mean curve over seeds."""
    steps = [int(step) for step, _ in cells[0]["curve"]]
    return steps, [statistics.mean(losses) for losses in zip(*([y for _, y in c["curve"]] for c in cells), strict=True)]


if __name__ == "__main__":
    printable()
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        config = ask(lambda prog: tyro.cli(Compare, prog=prog, args=sys.argv[1:end], description=__doc__))
        compare(config, sys.argv[end + 1 :], Console(soft_wrap=True, markup=False, emoji=False))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
