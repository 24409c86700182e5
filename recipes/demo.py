"""The demo: a small LLaMA learns the standard library's sources with SUMO, SNSM and AdamW, and the curves are drawn.

python -m recipes.demo            about five minutes on two cores
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from engine.checkpoint.lock import claim, claim_new
from engine.command import pasted, program
from engine.curves import loss_curve
from engine.flags import ask
from engine.metrics import read

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

    table = Table(title=f"{config.steps} steps on the same data", title_justify="left")
    for column in ("", "held-out loss, nats per byte", "optimizer state, MB", "s/step"):
        table.add_column(column, justify="right" if column else "left")
    curves, points = {}, {}
    for name in runs:
        folder = out / name.lower()
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        table.add_row(
            name,
            f"{result['eval/loss']:.4f}",
            f"{result['state_bytes'] / 1e6:.1f}",
            "-" if result["seconds_per_step"] is None else f"{result['seconds_per_step']:.2f}",  # too short to tell
        )
        rows = [(int(r["step"]), r["train/loss"]) for r in read(folder) if "train/loss" in r]
        curves[name] = [s for s, _ in rows], [y for _, y in rows]
        points[name] = [s for s, _ in result["curve"]], [y for _, y in result["curve"]]
    picture = loss_curve(out / "loss.png", curves, "SUMO, SNSM and AdamW on the standard library", held_out=points)
    console.rule("the three")
    console.print(table)
    console.print(
        f"curves       {picture}\nlook at it   {pasted(program('tensorboard'), '--logdir', out)}", highlight=False
    )


if __name__ == "__main__":
    main(lambda args: ask(lambda prog: tyro.cli(Demo, args=args, prog=prog, description=__doc__)), demo)
