"""The demo: a small LLaMA learns the standard library's sources with SUMO, SNSM and AdamW, and the curves are drawn.

python -m recipes.demo            about five minutes on two cores
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from engine.checkpoint.lock import claim, claim_new
from engine.curves import Curve, loss_curve
from engine.loop.metrics import read
from engine.loop.result import FILE
from engine.terminal.attempt import attempt
from engine.terminal.command import pasted, program
from engine.terminal.flags import ask

from . import baseline, snsm, sumo
from .cli import main
from .train import train


@dataclass(frozen=True)
class Demo:
    steps: int = 220
    """Optimizer steps of each of the three runs."""
    out: Path | None = None
    """Folder of the demo; by default a new one under runs/."""


def demo(config: Demo) -> None:
    """Three runs of the same length on the same data, a table and a picture."""
    with claim(config.out) if config.out else claim_new(Path("runs/demo")) as out:
        _demo(config, out)


def _demo(config: Demo, out: Path) -> None:
    """In a folder that is this process's own."""
    common: dict[str, Any] = {"steps": config.steps, "eval_every": 20}
    runs = {
        "SUMO": replace(sumo.PRESETS["demo"][1], out=out / "sumo", **common),
        "SNSM": replace(snsm.PRESETS["demo"][1], out=out / "snsm", **common),
        "AdamW": baseline.Baseline(lr=1e-3, rest_lr=3e-2, out=out / "adamw", **common),
    }
    console = Console(soft_wrap=True, markup=False, emoji=False)
    for i, (name, run) in enumerate(runs.items(), 1):
        console.rule(f"{i} of {len(runs)}: {name}")
        train(run)

    console.rule("the three")
    report(out, list(runs), config.steps, console)


def report(out: Path, names: Sequence[str], steps: int, console: Console) -> None:
    """A table and a picture of the runs in `out`, each of which is a line where it fails: they are trained."""
    table = Table(title=f"{steps} steps on the same data", title_justify="left")
    for column in ("", "held-out loss, nats per byte", "optimizer state, MB", "s/step"):
        table.add_column(column, justify="right" if column else "left")
    curves: dict[str, Curve] = {}
    points: dict[str, Curve] = {}

    def row(name: str) -> str:
        folder = out / name.lower()
        rows = [(int(r["step"]), r["train/loss"]) for r in read(folder) if "train/loss" in r]
        curves[name] = [s for s, _ in rows], [y for _, y in rows]
        result = json.loads((folder / FILE).read_text(encoding="utf-8"))
        points[name] = [s for s, _ in result["curve"]], [y for _, y in result["curve"]]
        seconds = result["seconds_per_step"]  # none where a run was too short to tell
        cost = [f"{result['state_bytes'] / 1e6:.1f}", "-" if seconds is None else f"{seconds:.2f}"]
        table.add_row(name, f"{result['eval/loss']:.4f}", *cost)
        return ""

    def picture() -> str:
        title = f"{', '.join(names[:-1])} and {names[-1]} on the standard library"
        return str(loss_curve(out / "loss.png", curves, title, held_out=points))

    for name in names:
        if line := attempt(partial(row, name), "read"):
            console.print(f"{name:12} {line}", highlight=False)
    console.print(table)
    console.print(f"curves       {attempt(picture, 'drawn')}", highlight=False)
    console.print(f"look at it   {pasted(program('tensorboard'), '--logdir', out)}", highlight=False)


if __name__ == "__main__":
    main(lambda args: ask(lambda prog: tyro.cli(Demo, args=args, prog=prog, description=__doc__)), demo)
