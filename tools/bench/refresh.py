"""Rebuilding the bases of a model: the randomized range finder against the exact SVD."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.data import Batches, Tokens
from engine.data.prepare import cached
from engine.data.request import Request
from models.llama import PRESETS, Llama
from optimizers.linalg import project, range_basis, svd_basis
from optimizers.random import fold

from .timing import Sides, ratio, report, timed
from .update import linear

SHOWN = {"CPU ms": "CPU ms", "ratio": "ratio", "energy of G": "energy", "over exact, least": "least"}
NOTES = (
    "ratio: over the exact SVD's time; energy: share of the gradients' energy that the bases hold;",
    "least: of a basis, over what the exact one holds.",
)


@dataclass(frozen=True)
class RefreshBench:
    """Bases of every Linear weight of a LLaMA preset from real gradients: CPU time, and gradient energy captured."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    training: int = 20
    """AdamW steps before the gradients are taken."""
    rounds: int = 3
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


def bench_refresh(config: RefreshBench) -> None:
    """All bases of a model, by both methods."""
    grads = [g for name, g in gradients(config).items() if linear(name)]
    made: dict[str, list[Tensor]] = {}

    def by_svd() -> None:
        made["exact SVD"] = [svd_basis(g, config.rank) for g in grads]

    def by_range() -> None:
        made["range finder"] = [range_basis(g, config.rank, fold(0, i)) for i, g in enumerate(grads)]

    sides: Sides = {"exact SVD": by_svd, "range finder": by_range}
    seconds = timed(sides, config.rounds, time.process_time)
    held = {n: [float(project(g, q).square().sum()) for g, q in zip(grads, qs, strict=True)] for n, qs in made.items()}
    rows: list[dict[str, object]] = []
    for name in sides:
        shares = [a / b for a, b in zip(held[name], held["exact SVD"], strict=True)]
        whole = sum(held[name]) / sum(float(g.square().sum()) for g in grads)
        rows.append(
            {
                "side": name,
                "CPU ms": statistics.median(seconds[name]) * 1e3,
                "ratio": ratio(seconds, name, "exact SVD"),
                "energy of G": whole,
                "over exact, least": min(shares),
                "over exact, mean": statistics.mean(shares),
            }
        )
    report(
        f"{len(grads)} bases of LLaMA-{config.model}, rank {config.rank}, {config.threads} thread(s)",
        rows,
        config,
        SHOWN,
        NOTES,
    )


def gradients(config: RefreshBench) -> dict[str, Tensor]:
    """Gradients of the preset on the standard library's sources, after some training."""
    data = Batches(Tokens(cached(Path("runs/.data"), Request())), 256)
    model = Llama(PRESETS[config.model])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(config.training + 1):
        model.zero_grad()
        batch = data.batch(4 * i, 4)
        cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()).backward()
        if i < config.training:
            optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
