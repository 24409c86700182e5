"""The slowest training step against the median, bases rebuilt in turn and all at once."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.data import Batches, Tokens
from engine.data.prepare import cached
from engine.data.request import Request
from engine.step.segments import cut
from engine.step.step import Step
from models.llama import PRESETS, Llama
from optimizers.contract import Group, Rule
from optimizers.partition import partition
from optimizers.rules.adamw import adamw
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo

from .timing import report

SHOWN = {
    "median ms": "median ms",
    "slowest ms": "slowest",
    "ratio": "ratio",
    "slowest without refresh / median": "no refresh",
}
NOTES = ("ratio: slowest over median; no refresh: the slowest step without a refresh over the median.",)


@dataclass(frozen=True)
class StaggerBench:
    """Training steps of the demo model with a subspace rule over one gap: CPU time of each step."""

    rule: Literal["snsm", "sumo"] = "snsm"
    rank: int = 48
    gap: int = 200
    batch: int = 8
    threads: int = 2
    json: Path | None = None
    """Also write the figures here."""


def bench_stagger(config: StaggerBench) -> None:
    """Both ways, over the steps of one gap that follow the first refresh."""
    data = Batches(Tokens(cached(Path("runs/.data"), Request())), 256)
    leading = functools.partial(sumo, basis="range")  # the bases that take longest
    make: Callable[[int, int], Rule] = snsm if config.rule == "snsm" else leading
    rows: list[dict[str, object]] = []
    for staggered in (True, False):
        model = Llama(PRESETS["demo"])
        params: dict[str, Tensor] = dict(model.named_parameters())
        groups = [
            Group(config.rule, make(config.rank, config.gap), ("_proj", "lm_head"), 0.01),
            Group("adamw", adamw(), ("",), 1e-3),
        ]
        optimizer = partition(params, groups, staggered)
        step = Step(cut(model), params, optimizer, optimizer.init(params))
        hypers = {g.name: {"lr": torch.tensor(g.lr), "weight_decay": torch.tensor(0.0)} for g in groups}
        seconds = []
        for i in range(config.gap + 3):
            batch = data.batch(i * config.batch, config.batch)
            start = time.process_time()
            step([batch], hypers, i)
            seconds.append(time.process_time() - start)
        seconds = seconds[3:]
        middle, slowest = statistics.median(seconds), max(seconds)
        plain = sorted(s for i, s in enumerate(seconds, 3) if not optimizer.due(i))
        name = "staggered" if staggered else "all at once"
        rows.append(
            {
                "side": name,
                "median ms": middle * 1e3,
                "slowest ms": slowest * 1e3,
                "ratio": slowest / middle,
                "slowest without refresh / median": plain[-1] / middle,
            }
        )
    report(
        f"{config.rule} rank {config.rank}, gap {config.gap}, demo model, {config.batch * 256} tokens",
        rows,
        config,
        SHOWN,
        NOTES,
    )
