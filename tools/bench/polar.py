"""Exact polar factors of moments against Newton-Schulz: time and errors."""

import functools
import itertools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from optimizers.linalg.polar import METHODS, by_svd, polar

from .timing import Sides, ratio, report, timed

SHOWN = {"CPU ms": "CPU ms", "ratio": "ratio", "|OO'-I|/sqrt(r)": "orthogonal", "|O-UV'|/sqrt(r)": "exact"}
NOTES = ("ratio: over newton_schulz's time; orthogonal: |OO'-I|/sqrt(r); exact: |O-UV'|/sqrt(r).",)


@dataclass(frozen=True)
class PolarBench:
    """Polar factors of r x n matrices with log-spaced singular values: process CPU time."""

    ranks: tuple[int, ...] = (32, 128)
    lengths: tuple[int, ...] = (1024, 4096)
    condition: float = 100.0
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


def bench_polar(config: PolarBench) -> None:
    """All methods on the same matrices; the condition number is that before rounding to float32."""
    rows: list[dict[str, object]] = []
    for r, n in itertools.product(config.ranks, config.lengths):
        u, v = (torch.linalg.qr(torch.randn(size, r, dtype=torch.float64))[0] for size in (r, n))
        x = (u * torch.logspace(0, -math.log10(config.condition), r, dtype=torch.float64) @ v.T).float()
        true, eye = by_svd(x.double()), torch.eye(r, dtype=torch.float64)
        sides: Sides = {method: functools.partial(polar, x, method) for method in METHODS}
        seconds = timed(sides, config.rounds, time.process_time)
        for method in METHODS:
            o = polar(x, method).double()
            rows.append(
                {
                    "side": f"{r} x {n} {method}",
                    "CPU ms": statistics.median(seconds[method]) * 1e3,
                    "ratio": ratio(seconds, method, "newton_schulz"),
                    "|OO'-I|/sqrt(r)": float((o @ o.T - eye).norm()) / math.sqrt(r),
                    "|O-UV'|/sqrt(r)": float((o - true).norm()) / math.sqrt(r),
                }
            )
    title = f"condition number {config.condition:g}, fp32, {config.threads} thread(s)"
    report(title, rows, config, SHOWN, NOTES)
