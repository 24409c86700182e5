"""The progress line of a run: loss, learning rates, throughput, memory."""

from collections.abc import Mapping

import torch

from ..memory import peak_bytes
from ..task import Task


def memory(device: torch.device) -> dict[str, float]:
    """The peak so far, by the name of what is measured."""
    kind = "peak_allocated_gib" if device.type == "cuda" else "peak_resident_gib"
    return {f"memory/{kind}": peak_bytes(device) / 2**30}


def speed(task: Task, rows: int, seconds: float) -> dict[str, float]:
    """The throughput of so many rows; nothing where none were counted."""
    return {f"train/{task.unit}_per_second": task.units(rows) / seconds} if rows and seconds > 0 else {}


def line(task: Task, scalars: Mapping[str, float], held_out: Mapping[str, float], evaluated: int, done: int) -> str:
    """The steps since the last line in a few words. An evaluation of an earlier step is said to be one."""
    used = next(v for k, v in scalars.items() if k.startswith("memory/"))
    fast = scalars.get(f"train/{task.unit}_per_second")
    parts = [
        f"loss {scalars['train/loss']:.3f}",
        task.shown(held_out) if held_out else "",
        f"(at step {evaluated})" if held_out and evaluated < done else "",
        "" if fast is None else f"{fast:,.0f} {task.unit}/s",
        f"{used:.2f} GiB",
    ]
    return "  ".join(filter(None, parts))
