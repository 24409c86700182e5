"""How well conditioned a moment is while a model trains: the claim on which exact orthogonalisation rests.

SUMO orthogonalises a moment that was projected on r directions; Muon one of full size, by a Newton-Schulz iteration
whose error its authors bound by the moment's condition number (arXiv 2505.24749, Lemma 3.2). Here both moments are kept
beside each other during a run of SUMO, saved with every checkpoint like any other state, and measured afterwards.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from engine import checkpoint
from engine.atomic import write_whole
from engine.curves import COLOURS, FAINT, INK, save
from optimizers.contract import Hyper, Kind, Rule, Slots, State, declare
from optimizers.linalg import project
from optimizers.rules.muon import newton_schulz
from optimizers.storage.slots import decoded


def watched(rule: Rule, momentum: float) -> Rule:
    """`rule` with two more slots: `full_momentum` (p's shape), the heavy-ball moment that a full-rank rule would keep,
    and `energy`, the share of this step's squared gradient that lies in the basis."""

    def init(p: Tensor) -> Slots:
        full = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)
        return {**rule.init(p), "full_momentum": full, "energy": full.new_zeros(())}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        delta, new = rule.update(g, slots, p, hyper)
        g = g.float()
        inside = project(g, slots["basis"]).square().sum() / g.square().sum().clamp(min=1e-38)
        return delta, {**new, "full_momentum": momentum * slots["full_momentum"] + g, "energy": inside}

    slots = (*rule.slots, *declare(full_momentum=Kind.FIRST, energy=Kind.COUNTER))
    return replace(rule, slots=slots, init=init, update=update)


class Sample(NamedTuple):
    """One moment of one matrix at one step."""

    step: int
    kind: str  # "projected" or "full"
    name: str
    values: Tensor  # singular values, descending, float64
    error: float  # ||NS5(M) - polar(M)||_F / sqrt(rank)
    energy: float

    @property
    def condition(self) -> float:
        """Largest over smallest singular value; of a moment that is not of full rank, infinite."""
        return float(self.values[0] / self.values[-1]) if self.values[-1] > 0 else math.inf


def measure(state: State, step: int) -> list[Sample]:
    """Samples of every watched matrix."""
    found = []
    for name, slots in state.items():
        if "full_momentum" in slots:
            slots = decoded(slots)
            for kind, moment in (("projected", slots["momentum_buffer"]), ("full", slots["full_momentum"])):
                u, values, vh = torch.linalg.svd(moment.double(), full_matrices=False)
                inexact = newton_schulz(moment, 5, torch.float32).double()
                error = float((inexact - u @ vh).norm()) / math.sqrt(len(values))
                found.append(Sample(step, kind, name, values, error, float(slots["energy"])))
    return found


def samples(out: Path) -> list[Sample]:
    """Samples of every checkpoint of a run, oldest first."""
    folders = sorted(path for path in out.glob("step-*") if path.is_dir())
    return [s for path in folders for s in measure(checkpoint.load(path).state, int(path.name.removeprefix("step-")))]


def summary(found: Sequence[Sample]) -> Table:
    """Medians and ranges over matrices, a row per step."""
    table = Table(title="condition numbers and Newton-Schulz's error, median \\[least, most] over matrices")
    for column in ("step", "κ projected", "κ full", "NS5 error projected", "NS5 error full", "energy in basis"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in dict.fromkeys(s.step for s in found):
        now = [s for s in found if s.step == step]
        projected, full = ([s for s in now if s.kind == kind] for kind in ("projected", "full"))
        table.add_row(
            str(step),
            *(_range([s.condition for s in part], ".3g") for part in (projected, full)),
            *(_range([s.error for s in part], ".2f") for part in (projected, full)),
            _range([s.energy for s in projected], ".2f"),
        )
    return table


def _range(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def plain(found: Sequence[Sample]) -> list[dict[str, Any]]:
    """As JSON can hold it; an infinite condition number is null."""
    return [
        {
            "step": s.step,
            "moment": s.kind,
            "parameter": s.name,
            "condition": s.condition if math.isfinite(s.condition) else None,
            "newton_schulz_error": s.error,
            "energy_in_basis": s.energy,
            "singular_values": [float(f"{v:.5g}") for v in s.values.tolist()],
        }
        for s in found
    ]


def write(found: Sequence[Sample], file: Path) -> str:
    write_whole(file, json.dumps(plain(found)) + "\n")
    return str(file)


def draw(found: Sequence[Sample], path: Path) -> Path:
    """Three panels: condition numbers over steps, spectra at the last step, Newton-Schulz's error over condition."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), dpi=160, layout="constrained")
    over, spectra, errors = figure.subplots(1, 3)
    steps = list(dict.fromkeys(s.step for s in found))
    for kind, colour in zip(("projected", "full"), COLOURS, strict=False):
        own = [s for s in found if s.kind == kind and math.isfinite(s.condition)]
        there = [step for step in steps if any(s.step == step for s in own)]
        by_step = [[s.condition for s in own if s.step == step] for step in there]
        over.plot(there, [median(c) for c in by_step], color=colour, linewidth=1.8, marker="o", label=kind)
        over.fill_between(there, [min(c) for c in by_step], [max(c) for c in by_step], color=colour, alpha=0.15)
        for s in own:
            if s.step == steps[-1]:
                rank = torch.linspace(0, 1, len(s.values))
                spectra.plot(rank, s.values / s.values[0], color=colour, linewidth=0.7, alpha=0.6)
        errors.scatter([s.condition for s in own], [s.error for s in own], s=7, color=colour, alpha=0.5, label=kind)
    over.set(title="condition number of the moment", xlabel="step", yscale="log")
    spectra.set(title=f"spectra at step {steps[-1]}", xlabel="index / rank", ylabel="σ / largest σ", yscale="log")
    errors.set(title="error of five Newton-Schulz steps", xlabel="condition number", xscale="log")
    errors.set_ylim(bottom=0)
    for axes in (over, spectra, errors):
        axes.grid(color=FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    over.legend(frameon=False)
    errors.legend(frameon=False)
    save(figure, path)
    return path
