"""OMGD's toy: linear regression with half of the coordinates masked a step, in six ways (arXiv 2603.05960, 5.1)."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engine.atomic import write_whole
from engine.checkpoint.lock import claim
from engine.curves import COLOURS, FAINT, INK, save
from engine.terminal.attempt import attempt
from optimizers.contract import UsageError
from optimizers.random import fold
from optimizers.wrappers.traversal import Traversal, coordinates, traversal


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Linear regression by SGD with half of the coordinates masked, in six ways; squared distance from the solution."""

    steps: int = 100_000
    """Steps of batch size 1."""
    seeds: int = 16
    """Runs of each way, each with data of its own."""
    samples: int = 1000
    """Rows of data; a pass over them is an epoch."""
    dimension: int = 10
    """Coordinates."""
    out: Path = Path("runs/omgd-toy")
    """Folder of the picture and the numbers."""


WAYS = ("no mask", "wor, epochwise", "wor, joint", "iid, per step", "iid, per epoch", "projection, per step")


class Rate(NamedTuple):
    early: float  # squared distance at a tenth of the steps, and at the end: geometric means over seeds of the mean
    late: float  # over the last fifth of the steps so far
    slope: float  # of a line through the last decade, in log-log


def distances(config: Toy) -> tuple[np.ndarray, np.ndarray]:
    """(steps, squared distances from the solution): float64 (blocks,) and (ways, seeds, blocks), means over blocks.

    f = (x'w - y)^2 / 2, x ~ N(0, I), y = x'u + N(0, 1), u uniform; step 3 / (t + 90); w starts at 0. Data comes in a
    new order each epoch, in every way. Section 5.1 of the paper, with its code's factor and without its 100 steps of
    full gradients at the start; a step size under which the theorem holds (their code's decays too fast for it).
    """
    ways, (S, n, d) = len(WAYS), (config.seeds, config.samples, config.dimension)
    half = d // 2
    x, y, solution = np.empty((S, n, d)), np.empty((S, n)), np.empty((S, d))
    for s in range(S):
        draw = np.random.default_rng([1, s])
        x[s] = draw.standard_normal((n, d))
        y[s] = x[s] @ draw.random(d) + draw.standard_normal(n)
        solution[s] = np.linalg.lstsq(x[s], y[s], rcond=None)[0]
    draw, seeds, own = np.random.default_rng(0), np.arange(S)[:, None], coordinates({"w": torch.empty(d)})
    keys = [fold(0, "toy", s) for s in range(S)]
    wor, joint, iid = (
        [traversal(own, key, keep=0.5, period=n, **options) for key in keys]
        for options in ({}, {"order": "joint"}, {"replacement": True})
    )
    block = max(1, config.steps // 1000)
    sums = np.zeros((-(-config.steps // block), ways, S))
    w = np.zeros((ways, S, d))
    for start in range(0, config.steps, 2 * n):  # a cycle at a time: two epochs
        order = draw.random((ways, S, 2, n)).argsort(-1).reshape(ways, S, 2 * n)
        mask = np.ones((ways, S, 2 * n, d))
        for s in range(S):
            mask[1, s] = np.repeat([kept(wor[s], start + j * n, d) for j in range(2)], n, axis=0)
            mask[4, s] = np.repeat([kept(iid[s], start + j * n, d) for j in range(2)], n, axis=0)
            pairs = [joint[s].batch(t) - start for t in range(start, start + 2 * n)]
            mask[2, s], order[2, s] = mask[1, s][pairs], order[2, s][pairs]  # pair (j, i): mask j, batch i of epoch j
        mask[3] = 2.0 * (draw.random((S, 2 * n, d)).argsort(-1) < half)
        basis = np.linalg.qr(draw.standard_normal((2 * n, S, d, half)))[0]
        projector = 2 * basis @ basis.swapaxes(-1, -2)
        rows = np.stack([x[seeds, order[i]] for i in range(ways)]).transpose(2, 0, 1, 3).copy()
        targets = np.stack([y[seeds, order[i]] for i in range(ways)]).transpose(2, 0, 1).copy()
        moves = rows * mask.transpose(2, 0, 1, 3)
        moves[:, 5] = (projector @ moves[:, 5][..., None])[..., 0]
        for t in range(start, min(start + 2 * n, config.steps)):
            row = rows[t - start]
            error = np.einsum("wsd,wsd->ws", row, w) - targets[t - start]
            w -= (3 / (t + 90) * error)[..., None] * moves[t - start]
            away = w - solution
            sums[t // block] += np.einsum("wsd,wsd->ws", away, away)
    counts = np.minimum(block, config.steps - block * np.arange(len(sums)))
    return block * np.arange(len(sums)) + counts, (sums / counts[:, None, None]).transpose(1, 2, 0)


def kept(masks: Traversal, step: int, d: int) -> np.ndarray:
    """The mask of a step, scale and all, float64 (d,)."""
    mask = np.zeros(d)
    mask[masks.entries("w", d, step).numpy()] = masks.scale
    return mask


def rates(steps: np.ndarray, squared: np.ndarray) -> dict[str, Rate]:
    """Ends and slopes of every way."""
    total = steps[-1]
    marks = np.geomspace(total / 10, total, 9)
    means = np.stack([squared[..., (steps > 0.8 * m) & (steps <= m * (1 + 1e-9))].mean(-1) for m in marks], -1)
    typical = np.exp(np.log(means).mean(1))
    slopes = [np.polyfit(np.log(marks), np.log(curve), 1)[0] for curve in typical]
    return {way: Rate(float(c[0]), float(c[-1]), float(s)) for way, c, s in zip(WAYS, typical, slopes, strict=True)}


def toy(config: Toy) -> dict[str, Rate]:
    """Run it, draw it, print it."""
    if config.steps < 20 * config.samples or config.seeds < 1 or config.dimension < 2 or config.dimension % 2:
        raise UsageError(
            f"--steps must be at least 20 epochs, --seeds at least 1, --dimension even: got {config.steps} steps of "
            f"{config.samples} samples, {config.seeds} seeds, {config.dimension} coordinates"
        )
    with claim(config.out):  # before the work
        return _toy(config)


def _toy(config: Toy) -> dict[str, Rate]:
    """In a folder that is this process's own."""
    steps, squared = distances(config)
    found = rates(steps, squared)
    numbers = {way: rate._asdict() for way, rate in found.items()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    text, file = json.dumps({"config": settings, "rates": numbers}, indent=1) + "\n", config.out / "toy.json"

    def written() -> str:
        write_whole(file, text)
        return str(file)

    table = Table(title=f"squared distance from the solution, {config.seeds} seeds", title_justify="left")
    for column in ("masks", f"at {config.steps // 10:,}", f"at {config.steps:,}", "slope", "over no mask"):
        table.add_column(column, justify="right" if column != "masks" else "left")
    for way, rate in found.items():
        over = rate.late / found["no mask"].late
        table.add_row(way, f"{rate.early:.2e}", f"{rate.late:.2e}", f"{rate.slope:.2f}", f"{over:.3g}")
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(table)
    wor, step, epoch = (found[way].late for way in ("wor, epochwise", "iid, per step", "iid, per epoch"))
    console.print(
        f"An i.i.d. mask a step ends {step / wor:.3g} times as far as a traversal; one that is held for an epoch ends "
        f"{epoch / wor:.2f} times as far:\nwhat this problem shows is the cost of masks that change every step, not "
        "that of drawing with replacement."
    )
    console.print(f"picture {attempt(lambda: str(draw_toy(config.out / 'toy.png', steps, squared, found)), 'drawn')}")
    console.print(f"numbers {attempt(written, 'written')}")
    return found


def draw_toy(path: Path, steps: np.ndarray, squared: np.ndarray, found: dict[str, Rate]) -> Path:
    """All ways in log-log, with lines of slope -1 and -2 to compare with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    typical = np.exp(np.log(squared).mean(1))
    shown = np.unique(np.geomspace(1, len(steps), 160).astype(int)) - 1
    for i, (way, rate) in enumerate(found.items()):
        curve = [typical[i][(steps > 0.8 * steps[k]) & (steps <= steps[k])].mean() for k in shown]
        style: dict[str, Any] = {"color": COLOURS[i]}
        if i > 3:  # these lie upon others
            style["linestyle"] = (0, (4, 3)) if i == 4 else (0, (1, 1.5))
        axes.plot(steps[shown], curve, linewidth=1.8, label=f"{way}, slope {rate.slope:.2f}", **style)
    first, last = steps[-1] / 30, steps[-1]
    for power, where in ((1, found["iid, per step"].late * 2.2), (2, found["no mask"].late / 2.5)):
        line = [where * (last / t) ** power for t in (first, last)]
        axes.plot((first, last), line, color="#999999", linewidth=0.9)
        axes.annotate(
            f"1/t{'²' if power == 2 else ''}", (last, line[1]), (4, -3), textcoords="offset points", color=INK
        )
    axes.set(xscale="log", yscale="log")
    axes.set_title("Linear regression, half of the coordinates a step", loc="left", fontweight="bold", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("squared distance from the solution", color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, which="both", length=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
    save(figure, path)
    return path
