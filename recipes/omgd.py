"""Mask traversal (arXiv 2603.05960): only some layers train at a time, drawn without replacement.

    python -m recipes.omgd toy                     the paper's linear regression: which masks converge at which rate
    python -m recipes.omgd pretrain                a LLaMA, 2 of 6 layers at a time, on the standard library's sources
    python -m recipes.omgd pretrain --over snsm --active 3 --period 1epoch --model 130m --data corpus/*.jsonl.xz
    python -m recipes.omgd memory                  what training LLaMA-7B holds, as the paper counts and as this engine

`pretrain --replacement` is LISA (also `python -m recipes.baseline --optimizer lisa`).
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from models.llama import PRESETS, Llama
from optimizers.adamw import adamw
from optimizers.core import Group, Optimizer, Params, State, UsageError, partition, state_bytes
from optimizers.galore import galore
from optimizers.omgd import omgd
from optimizers.random import Key, fold
from optimizers.sumo import sumo
from optimizers.traversal import Traversal, coordinates, describe, duration, gives_up, layers, tensors, traversal
from tools.plot import COLOURS, FAINT, INK

from . import baseline, snsm
from .common import main, train
from .config import MATRICES, Setup, TrainConfig, groups_for

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainConfig):
    """Train a LLaMA with masks over any rule."""

    over: Literal["adamw", "sgd", "muon", "galore", "snsm", "sumo"] = "adamw"
    """The rule that masks choose for."""
    by: Literal["layers", "tensors", "coordinates"] = "layers"
    """What a mask chooses among. Embedding, head and last norm always train when that is layers."""
    active: int = 2
    """layers: how many train at a time."""
    keep: float = 0.5
    """tensors, coordinates: the share that trains at a time."""
    balance: Literal["count", "numel"] = "count"
    """tensors: masks of equally many tensors, or of about equally many elements."""
    match: tuple[str, ...] = ()
    """tensors, coordinates: regular expressions on the names of what is masked. Without any: every tensor, and the
    matrices of attention and MLP."""
    period: str = "100step"
    """How long a mask is held: 1epoch, 2epoch, 100step. Only whole epochs pair every sample with every mask."""
    order: Literal["epochwise", "joint"] = "epochwise"
    """joint: the pairs of (mask, batch) of a cycle in random order. A mask a step: needs --state-policy keep."""
    remainder: Literal["short", "reset"] = "short"
    """Layers left over when --active does not divide: a mask of their own, or skipped this cycle (Algorithm 2)."""
    reshuffle: bool = True
    """Draw new masks each cycle."""
    replacement: bool = False
    """Draw each mask from all layers, whatever trained before (LISA)."""
    scale_mode: Literal["grad", "none", "update"] | None = None
    """What is multiplied by the number of masks: gradients (as in the paper; under AdamW it all but cancels), nothing
    (by default with --replacement), or updates."""
    state_policy: Literal["drop", "keep", "offload"] = "drop"
    """State of what is frozen: freed, kept, or moved to the host."""
    mask_warmup: str = "0step"
    """How long everything trains before the first mask; memory is full until then."""
    rank: int = 48
    """galore, snsm, sumo: dimension of the subspace."""
    update_proj_gap: int = 200
    """galore, snsm, sumo: steps between two bases; a tensor that starts anew gets one at once."""
    momentum: float = 0.95
    """sgd, muon."""

    @property
    def optimizer(self) -> str:
        return f"over-{self.over}"

    recipe = "omgd"
    align = True

    def groups(self, params: Params) -> list[Group]:
        return groups(self, params)

    def optimizer_for(self, setup: Setup) -> Optimizer:
        """The masked optimizer, and on the way what the schedule means for this run."""
        made = schedule(self, setup.params, setup.epoch, setup.key)
        mode = self.scale_mode or ("none" if self.replacement else "grad")
        optimizer = omgd(super().optimizer_for(setup), setup.params, made, mode, self.state_policy)
        now = describe(optimizer.about, setup.params, made.warmup)
        masks = "a mask drawn anew each time" if made.replacement else f"{made.masks} masks a cycle, each"
        print(
            f"{len(made.groups.labels)} {made.groups.kind} to choose from, {masks} held for {made.period:,} steps; "
            f"{now['trainable']:.0%} of all parameters train under the first"
        )
        if lost := gives_up(made, setup.epoch):
            print(f"warning: {lost}", file=sys.stderr)
        if not made.replacement and (left := (self.steps - made.warmup) % made.length):
            print(
                f"warning: the run ends {left:,} steps into a cycle of {made.length:,}: not everything trains equally "
                "long",
                file=sys.stderr,
            )
        return optimizer

    def check(self) -> None:
        super().check()
        self.at_least("update_proj_gap", 1)
        if self.by == "tensors" and self.compile != "off":
            raise UsageError(
                f"--by tensors: got --compile {self.compile}, expected off: every set of tensors that train inside a "
                "segment would be compiled anew"
            )
        if self.by == "layers" and self.compile == "step":
            raise UsageError("--compile step: one graph of everything would be compiled for every mask; use segments")


def groups(config: Pretrain, params: Params) -> list[Group]:
    """Who trains what, masks aside: as the recipe of each rule has it."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    match config.over:
        case "adamw" | "sgd" | "muon" | "galore":
            own = baseline.Baseline(
                **given,
                optimizer=config.over,
                rank=config.rank,
                update_proj_gap=config.update_proj_gap,
                momentum=config.momentum,
            )
            return baseline.groups(own, params)
        case "snsm":
            return snsm.groups(snsm.Snsm(**given, rank=config.rank, update_proj_gap=config.update_proj_gap), params)
        case "sumo":
            return groups_for(config, sumo(config.rank, config.update_proj_gap), "matrices of attention and MLP")


def schedule(config: Pretrain, params: Params, epoch: int, key: Key) -> Traversal:
    """The masks that the flags ask for, `epoch` steps being a pass over the data."""
    if config.by == "layers":
        chosen = layers(params)
    elif config.by == "tensors":
        chosen = tensors(params, config.match or ("",), config.balance)
    else:
        chosen = coordinates(params, config.match or (MATRICES,))
    return traversal(
        chosen,
        key,
        active=config.active if config.by == "layers" else None,
        keep=None if config.by == "layers" else config.keep,
        period=duration(config.period, epoch),
        order=config.order,
        remainder=config.remainder,
        reshuffle=config.reshuffle,
        replacement=config.replacement,
        mask_warmup=duration(config.mask_warmup, epoch),
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Weights, gradients and optimizer state of training a LLaMA, from its shapes alone."""

    model: Literal["demo", "60m", "130m", "350m", "1b", "7b"] = "7b"
    """Size of the LLaMA."""
    active: tuple[int, ...] = (1, 2, 4, 8)
    """Layers that train at a time, a row each."""
    rank: int = 128
    """Of GaLore's subspaces."""


class Held(NamedTuple):
    """Bytes that training holds besides activations."""

    weights: int
    gradients: int
    moments: int
    segment: int  # the largest gradients of one segment
    state: int  # of this engine: moments in float32, bases and clocks too


def held(optimizer: Optimizer, params: Params) -> Held:
    """Weights, gradients and moments in bfloat16, as the paper counts; and what this engine holds."""
    state: State = optimizer.init(params)
    trainable, _ = optimizer.view(params, state)
    blocks: dict[str, int] = {}
    for name, p in trainable.items():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else name
        blocks[block] = blocks.get(block, 0) + 2 * p.numel()
    moments = sum(t.numel() for slots in state.values() for slot, t in slots.items() if slot.startswith("exp_avg"))
    return Held(
        2 * sum(p.numel() for p in params.values()),
        sum(blocks.values()),
        2 * moments,
        max(blocks.values()),
        sum(map(state_bytes, state.values())),
    )


def memory(config: Memory) -> dict[str, Held]:
    """What each way of training holds, by name."""
    with torch.device("meta"):
        model = Llama(PRESETS[config.model])
    params: Params = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    everything = partition(params, [Group("adamw", adamw(), ("",), 0.0)])
    low_rank = [Group("galore", galore(config.rank), (MATRICES,), 0.0), Group("adamw", adamw(), ("",), 0.0)]
    rows = {
        "AdamW": held(everything, params),
        f"GaLore, rank {config.rank}": held(partition(params, low_rank), params),
    }
    for active in config.active:
        masks = traversal(layers(params), Key(0), active=active, period=1)
        rows[f"OMGD, {active} of {len(masks.groups.labels)} layers"] = held(omgd(everything, params, masks), params)
    return rows


def show_memory(config: Memory) -> None:
    """Print the table."""
    table = Table(title=f"LLaMA-{config.model}, GiB, without activations", title_justify="left")
    table.add_column("")
    for column in ("weights", "all gradients", "moments, bf16", "sum"):
        table.add_column(column, justify="right")
    for column in ("a segment's gradients", "state, fp32", "sum"):
        table.add_column(column, justify="right", style="cyan")
    for name, (weights, gradients, moments, segment, state) in memory(config).items():
        theirs, ours = (weights, gradients, moments), (segment, state)
        figures = [*theirs, sum(theirs), *ours, weights + sum(ours)]
        table.add_row(name, *(f"{figure / GIB:.2f}" for figure in figures))
    watched = sys.stdout.isatty()
    console = Console(soft_wrap=not watched, width=None if watched else 120, highlight=False)
    console.print(table)
    console.print(
        "The first four as the paper counts: bfloat16, gradients of all that trains, GaLore without its bases. The "
        "last\nthree as this engine holds it: weights in bfloat16, gradients of one segment, moments, bases and clocks "
        "in float32."
    )


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
    steps, squared = distances(config)
    found = rates(steps, squared)
    config.out.mkdir(parents=True, exist_ok=True)
    picture = draw_toy(config.out / "toy.png", steps, squared, found)
    numbers = {way: rate._asdict() for way, rate in found.items()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    (config.out / "toy.json").write_text(json.dumps({"config": settings, "rates": numbers}, indent=1) + "\n")
    table = Table(title=f"squared distance from the solution, {config.seeds} seeds", title_justify="left")
    for column in ("masks", f"at {config.steps // 10:,}", f"at {config.steps:,}", "slope", "over no mask"):
        table.add_column(column, justify="right" if column != "masks" else "left")
    for way, rate in found.items():
        over = rate.late / found["no mask"].late
        table.add_row(way, f"{rate.early:.2e}", f"{rate.late:.2e}", f"{rate.slope:.2f}", f"{over:.3g}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    wor, step, epoch = (found[way].late for way in ("wor, epochwise", "iid, per step", "iid, per epoch"))
    console.print(
        f"An i.i.d. mask a step ends {step / wor:.3g} times as far as a traversal; one that is held for an epoch ends "
        f"{epoch / wor:.2f} times as far:\nwhat this problem shows is the cost of masks that change every step, not "
        f"that of drawing with replacement.\n{picture}"
    )
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
    figure.savefig(path)
    return path


Command = (
    Annotated[Toy, tyro.conf.subcommand("toy")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
)


def run(config: Toy | Pretrain | Memory) -> None:
    """One subcommand."""
    if isinstance(config, Toy):
        toy(config)
    elif isinstance(config, Memory):
        show_memory(config)
    else:
        train(config)


if __name__ == "__main__":
    main(lambda: tyro.cli(Command, description=__doc__), run)
