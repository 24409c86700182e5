"""`result.json`: the settings, final metrics and costs of a finished run."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from optimizers.contract import total_bytes

from ..atomic import write_whole
from ..memory import peak_bytes
from .metrics import Metrics
from .trainer import Trainer

FILE = "result.json"


def evaluations(trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float]) -> list[tuple[int, float]]:
    """(step, held-out loss); a finished run, resumed in another folder, trained nothing and has the last one."""
    points = [(int(r["step"]), r["eval/loss"]) for r in metrics.history if "eval/loss" in r]
    return points or [(trainer.done, held_out["loss"])]


def result(trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float]) -> dict[str, Any]:
    """Steps, units trained on, the metrics of the last evaluation, the curve of its loss, memory and speed."""
    task, config = trainer.task, trainer.config
    rates = [r[key] for r in metrics.history if (key := f"train/{task.unit}_per_second") in r]
    units = task.units(config.micro_batch * config.accumulation)
    return {
        "steps": trainer.done,
        task.unit: trainer.trained,
        **{f"eval/{name}": value for name, value in held_out.items()},
        "curve": evaluations(trainer, metrics, held_out),
        "state_bytes": total_bytes(trainer.step.state),
        "peak_bytes": peak_bytes(trainer.step.device),
        "seconds_per_step": units / median(rates) if rates else None,
    }


def write_result(trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float]) -> Path:
    """Write `result.json` into the run's folder; returns its path."""
    file = trainer.out / FILE
    write_whole(file, json.dumps(result(trainer, metrics, held_out), indent=1) + "\n")
    return file
