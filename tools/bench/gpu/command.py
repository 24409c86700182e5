"""`python -m tools.bench gpu`: every table that needs a GPU, the most valuable first, until the time is up.

It needs torch, numpy, einops and safetensors, nothing else. On a CPU it runs a toy, which tests it, no more.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from engine.arithmetic import FIXED, WORKSPACE
from engine.terminal.command import typed
from optimizers.registry import RULES

from . import measures, sides
from .rows import Measure, Rows


class Sizes(NamedTuple):
    """What is run where: of speeds, of peaks (with the number of tokens of a micro-batch), and of a resume."""

    speed: tuple[tuple[str, int], ...]
    peaks: tuple[tuple[str, int], ...]
    resume: str


CUDA = Sizes((("130m", 16384), ("350m", 16384), ("1b", 8192)), (("1b", 4096), ("7b", 2048)), "60m")
TOY = Sizes((("toy", 64),), (("toy", 64),), "toy")


def measurements(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, str, Measure]]:
    """(table, row, what measures it), in the order of their worth."""
    for name in ("adamw", "sgd", "muon", "galore", "sumo", "snsm", "omgd", "rso"):
        yield "Each rule against the CPU", name, partial(measures.agrees, name, device)
    for precision in ("fp32", "bf16", "bf16-sr", "mixed"):
        for method in sides.METHODS:
            yield (
                "Waits of an ordinary step",
                f"{method} {precision}",
                partial(measures.waits, method, device, precision),
            )
    for size, tokens in sizes.speed:
        yield from _speeds(device, size, tokens)
    for size, tokens in sizes.peaks:
        for method in sides.METHODS:
            peak = partial(measures.memory, method, size, device, tokens, recompute=True)
            yield "Peaks", f"{size} {method}, recompute", peak
    for method in ("adamw", "sumo"):
        row = partial(measures.resumes, method, device, sizes.resume)
        yield "Resumes with --deterministic", f"{sizes.resume} {method}", row
    yield "Saving beside training", sizes.peaks[-1][0], partial(measures.saving, "adamw", sizes.peaks[-1][0], device)


def _speeds(device: torch.device, size: str, tokens: int) -> Iterator[tuple[str, str, Measure]]:
    """The engine's methods and torch's own loops, at one size."""

    def timed(make: Callable[[], Callable[[], object]]) -> Measure:
        return lambda: measures.speed(make(), size, device, tokens, seconds=5 if device.type == "cuda" else 0)

    table = f"Speed, {size}, bf16, {tokens} tokens"
    for optimizer, recompute in (("adamw", False), ("adamw", True), ("muon", False)):
        name = f"torch.compile, {optimizer}{', checkpoint' * recompute}"
        yield table, name, timed(partial(sides.usual, size, device, tokens, optimizer, recompute))
    for method in (*sides.METHODS, "muon"):
        yield table, f"segments, {method}", timed(partial(sides.ours, method, size, device, tokens))
    recomputed = partial(sides.ours, "adamw", size, device, tokens, recompute=True)
    yield table, "segments, adamw, recompute", timed(recomputed)


def main(words: Sequence[str]) -> int:
    """Measure until the time is up; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"{typed()} gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no row after so many (default 9)")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl and table.md")
    parser.add_argument("--only", default="", help="measure only tables whose title contains this")
    asked = parser.parse_args(words)
    if not asked.minutes > 0:
        print(f"error: --minutes: got {asked.minutes}, expected more than 0", file=sys.stderr)
        return 2
    if os.environ.get(WORKSPACE) not in FIXED:
        os.environ[WORKSPACE] = FIXED[0]  # before CUDA starts, for the resumes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [m for m in measurements(device, CUDA if device.type == "cuda" else TOY) if asked.only in m[0]]
    if not chosen:
        titles = list(dict.fromkeys(m[0] for m in measurements(device, TOY)))
        print(f"error: --only: got {asked.only!r}, expected a part of one of {titles}", file=sys.stderr)
        return 2
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: a toy, which measures nothing"
    rows = Rows(asked.out, 60 * asked.minutes, {"device": named, "torch": torch.__version__, "rules": len(RULES)})
    for table, name, measure in chosen:
        measures.free(device)
        rows.measure(table, name, measure)
    return 0
