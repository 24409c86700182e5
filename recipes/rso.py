"""Train a LLaMA with randomized subspace optimization (RSO, arXiv 2502.07222), any rule as its inner solver.

    python -m recipes.rso demo                                     about 3 M parameters, the standard library's sources
    python -m recipes.rso demo --inner snsm --share                another inner rule; q, k, v share a P
    python -m recipes.rso 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model
    python -m recipes.rso toy                                      the theory's bound, and where GaLore gets stuck

The paper's pre-training settings could not be read: its steps per subproblem, learning rates, ranks and the layers it
treats were NOT FOUND. Ranks and periods here are GaLore's for the same models (128, 256, 256, 512 and 1024; 200, and
500 for 7B), the protocol is that of the paper's third-party reproduction (arXiv 2602.23111): C4, sequences of 256,
batches of 512 of them, bf16, warm-up over a tenth of the steps, cosine to a tenth of the peak, no decay. Learning
rates are ours: the update has the size of the inner rule's, so dense AdamW's rates are where to look.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.layers import attach
from optimizers.adamw import adamw
from optimizers.core import Group, Hyper, Optimizer, Params, Rule, UsageError, partition, refresh
from optimizers.galore import galore
from optimizers.linalg import lift, project, svd_basis
from optimizers.muon import muon
from optimizers.random import fold, normal, signs
from optimizers.rso import SHARED, draw, rso
from optimizers.sgd import sgd
from optimizers.snsm import snsm
from optimizers.sumo import sumo
from tools.plot import COLOURS, FAINT, INK, spread

from .common import main, train
from .config import MATRICES, Setup, TrainConfig, rest_for


@dataclass(frozen=True, kw_only=True)
class Rso(TrainConfig):
    inner: Literal["adamw", "sgd", "muon", "snsm", "galore", "sumo"] = "adamw"
    """The rule that moves B, for the matrices of attention and MLP; AdamW trains the rest, its state never reset."""
    rank: int = 48
    """Columns of P and B."""
    period: int = 200
    """Steps between two P."""
    form: Literal["merged", "products"] = "merged"
    """What is in memory: W + B Pᵀ, or W and B apart until the end of the period, which is slower and larger."""
    projection: Literal["gaussian", "haar", "coordinate"] = "gaussian"
    """How P is drawn."""
    share: bool = False
    """One P for q, k and v and one for gate and up: their x P is kept once."""
    moments: Literal["reset", "keep", "transform"] = "reset"
    """What happens to the inner rule's state when P changes."""
    prox: float = 0.0
    """1/eta of the penalty ||B||²/(2 eta); 0 leaves it out, as public code does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, snsm, galore."""
    momentum: float = 0.95
    """sgd, muon, sumo."""
    inner_rank: int = 12
    """snsm, galore, sumo: dimension of their own subspace, of B."""
    update_proj_gap: int = 50
    """snsm, galore, sumo: steps between two bases of that; each new P brings one too."""

    recipe = "rso"

    def groups(self, params: Params) -> list[Group]:
        return groups(self)

    def optimizer_for(self, setup: Setup) -> Optimizer:
        """RSO over the groups' rules, and slots for P and B in the model."""
        names = [name for name in setup.params if re.search(MATRICES, name)]
        base, share = super().optimizer_for(setup), SHARED if self.share else ()
        subspaces = self.rank, self.period, setup.key, self.form, self.projection, share, self.moments, self.prox
        wrapped = rso(base, setup.params, names, *subspaces)
        attach(setup.model, names, self.rank, self.form)
        return wrapped

    def check(self) -> None:
        super().check()
        self.at_least("period", 1)
        self.at_least("prox", 0)
        self.at_least("update_proj_gap", 1)

    @property
    def optimizer(self) -> str:
        return self.inner


def rule(config: Rso) -> Rule:
    """The inner rule."""
    match config.inner:
        case "adamw":
            return adamw(config.betas)
        case "sgd":
            return sgd(config.momentum)
        case "muon":
            return muon(config.momentum)
        case "snsm":
            return snsm(config.inner_rank, config.update_proj_gap, betas=config.betas)
        case "galore":
            return galore(config.inner_rank, config.update_proj_gap, betas=config.betas)
        case "sumo":
            return sumo(config.inner_rank, config.update_proj_gap, config.momentum)


def groups(config: Rso) -> list[Group]:
    """The inner rule on attention and MLP; AdamW on the rest, at the same learning rate unless told otherwise."""
    why = f"attention and MLP, in subspaces of rank {config.rank}"
    return [Group("rso", rule(config), (MATRICES,), config.lr, config.weight_decay, why), *rest_for(config)]


def paper(model: Literal["60m", "130m", "350m", "1b", "7b"], rank: int, steps: int, period: int = 200) -> Rso:
    """The reproduction's protocol; lr is ours."""
    return Rso(
        model=model,
        lr=2e-3,
        rank=rank,
        period=period,
        steps=steps,
        micro_batch=32,
        accumulation=16,
        precision="bf16-sr",
        eval_every=1000,
    )


@dataclass(frozen=True)
class Toy:
    steps: int = 40_000
    """Of each method in the counter-example."""
    seed: int = 0
    """Of the problems and of every draw."""
    out: Path = Path("runs/rso-toy")
    """Folder for the picture."""


PRESETS: dict[str, tuple[str, Rso | Toy]] = {
    "demo": ("About 3 M parameters; a quarter of the hidden size as rank, lr ours.", Rso(lr=3e-3)),
    "60m": ("Rank 128, 10,000 steps: GaLore's; lr ours.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256, 20,000 steps: GaLore's; lr ours.", paper("130m", 256, 20_000)),
    "350m": ("Rank 256, 60,000 steps: GaLore's; lr ours.", paper("350m", 256, 60_000)),
    "1b": ("Rank 512 (GaLore's table; its script has 1024), 100,000 steps; lr ours.", paper("1b", 512, 100_000)),
    "7b": ("Rank 1024, a new P every 500 of 150,000 steps: GaLore's; lr ours.", paper("7b", 1024, 150_000, 500)),
    "toy": ("No model: least squares against the theory's bound, and GaLore's counter-example.", Toy()),
}


# Toy problems. P stands at the left of X here, as in the paper: X is the transpose of a weight.


def least_squares(seed: int = 0, m: int = 64, n: int = 16, rank: int = 8, rounds: int = 400) -> tuple[float, Params]:
    """(the bound, mean ||grad f||² over the rounds by projection and by 1/eta in units of 2 Lhat).

    f(X) = ||A X - Y||²/2 with L the largest eigenvalue of AᵀA, every subproblem solved exactly. If E PPᵀ = I and
    ||P||² <= m/r then, with Lhat = L m/r and eta = 1/(2 Lhat), the mean is at most 6 Lhat (f(0) - min f) / rounds.
    """
    key = fold(seed, "least squares")
    a, y = normal(fold(key, "A"), (m, m)).double(), normal(fold(key, "Y"), (m, n)).double()
    h, c = a.T @ a, a.T @ y
    lhat = float(torch.linalg.eigvalsh(h)[-1]) * m / rank
    bound = 6 * lhat * float(y.square().sum()) / 2 / rounds  # A is invertible: min f = 0
    means: Params = {}
    for projection in ("haar", "coordinate", "gaussian"):
        for strength in (1.0, 0.1, 0.0):
            x, total = torch.zeros_like(c), torch.zeros((), dtype=c.dtype)
            for k in range(rounds):
                g = h @ x - c
                total += g.square().sum()
                p = draw(projection, fold(key, "P", k), m, rank).double()
                system = p.T @ h @ p + strength * 2 * lhat * torch.eye(rank)
                x = x - p @ torch.linalg.solve(system, p.T @ g)
            means[f"{projection}/{strength:g}"] = total / rounds
    return bound, means


class Counterexample:
    """f(X) = ||A X||²/2 + <B, X> with A = (I 0): its gradient is X + B in the first n - r rows and 0 in the others,
    where all the noise is: +-1 times the identity, on an r x r block. The noise is larger than what is left of the
    gradient once its largest directions are gone, so the leading singular directions are the noise's, always.
    """

    def __init__(self, seed: int, n: int = 10, rank: int = 4) -> None:
        key = fold(seed, "counterexample")
        self.rank, self.top, self.key = rank, n - rank, key
        self.b = torch.zeros(n, n)
        self.b[: self.top, : self.top] = normal(fold(key, "B"), (self.top, self.top))
        self.start = torch.zeros(n, n)
        self.start[: self.top, : self.top] = torch.eye(self.top) / 2
        self.start[self.top :] = normal(fold(key, "X"), (rank, n))
        self.block = torch.zeros(n, n)
        self.block[self.top :, self.top :] = torch.eye(rank)

    def gradient(self, x: Tensor) -> Tensor:
        g = self.b.clone()
        g[: self.top] += x[: self.top]
        return g

    def run(self, method: str, steps: int, lr: float = 1e-2, gap: int = 100, every: int = 100) -> list[float]:
        """||grad f||² every so many steps, by the optimizers of this library; X is a weight's transpose."""
        params: Params = {"x.weight": self.start.T.clone()}
        rule = galore(self.rank, gap, 1.0, basis="svd") if method == "GaLore, Adam" else sgd(0.0)
        base = partition(params, [Group("all", rule, ("",), lr)])
        inside = method.removeprefix("RSO ") if method.startswith("RSO") else ""
        optimizer = rso(base, params, params, self.rank, gap, self.key, projection=inside) if inside else base
        state = optimizer.init(params)
        hyper: dict[str, Hyper] = {"all": {"lr": torch.tensor(lr), "weight_decay": torch.tensor(0.0)}}
        noise, basis, norms = signs(fold(self.key, "noise"), steps).tolist(), torch.empty(0), []
        for step in range(steps):
            exact = self.gradient(params["x.weight"].T)
            if step % every == 0:
                norms.append(float(exact.square().sum()))
            g = (exact + noise[step] * self.block).T.contiguous()
            if method == "GaLore, SGD":
                basis = svd_basis(g, self.rank) if step % gap == 0 else basis
                g = lift(project(g, basis), basis, g)
            if optimizer.turns(step):
                params, state = optimizer.turn(params, state, step, self.key)
            grads = {"x.B": g @ state["x.weight"]["P"]} if inside else {"x.weight": g}
            state, _ = refresh(optimizer, grads, state, step, self.key)
            params, state = optimizer.update(grads, state, params, hyper)
        norms.append(float(self.gradient(params["x.weight"].T).square().sum()))
        return norms


METHODS = ("SGD", "GaLore, SGD", "GaLore, Adam", "RSO haar", "RSO gaussian", "RSO coordinate")


def toy(config: Toy) -> None:
    """Both toy problems: two tables and a picture."""
    if config.steps < 100:
        raise UsageError(f"--steps must be at least 100, got {config.steps}")
    console = Console(soft_wrap=True)
    bound, means = least_squares(config.seed)
    table = Table(title="least squares, mean ||grad f||² over 400 subproblems solved exactly", box=SIMPLE_HEAD)
    for column in ("P", "1/eta = 2 Lhat", "0.2 Lhat", "0", "bound at 2 Lhat"):
        table.add_column(column, justify="left" if column == "P" else "right")
    for projection in ("haar", "coordinate", "gaussian"):
        row = (f"{float(means[f'{projection}/{strength}']):,.1f}" for strength in ("1", "0.1", "0"))
        table.add_row(projection, *row, f"{bound:,.1f}" if projection != "gaussian" else "none: ||P||² > m/r")
    console.print(table)

    problem, every = Counterexample(config.seed), 100
    with console.status("GaLore's counter-example"):
        curves = {method: problem.run(method, config.steps, every=every) for method in METHODS}
    table = Table(title=f"GaLore's counter-example, ||grad f||² after {config.steps:,} steps", box=SIMPLE_HEAD)
    table.add_column("method")
    table.add_column("at the end", justify="right")
    table.add_column("mean of the last tenth", justify="right")
    for method, norms in curves.items():
        last = norms[-max(1, len(norms) // 10) :]
        table.add_row(method, f"{norms[-1]:.2g}", f"{sum(last) / len(last):.2g}")
    console.print(table)
    config.out.mkdir(parents=True, exist_ok=True)
    console.print(f"picture {picture(config.out / 'counterexample.png', curves, every)}", highlight=False)


def picture(path: Path, curves: dict[str, list[float]], every: int, floor: float = 1e-8) -> Path:
    """The squared gradient norms over steps, on logarithmic axes; what falls below `floor` leaves the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    axes: Any = figure.add_subplot()
    ceiling = 4 * max(max(norms) for norms in curves.values())
    ends = [math.log10(max(norms[-1], floor)) for norms in curves.values()]
    heights = spread(ends, 0.055 * (math.log10(ceiling) - math.log10(floor)))
    for (name, norms), height, colour in zip(curves.items(), heights, COLOURS, strict=False):
        shown = next((i for i, y in enumerate(norms) if y < floor), len(norms))
        axes.plot([every * i for i in range(1, shown)], norms[1:shown], color=colour, linewidth=1.3)
        where: dict[str, Any] = {"xy": (1.01, 10**height), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{name}  {norms[-1]:.2g}", **where, annotation_clip=False, va="center", fontsize=9, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling)
    axes.set_title("GaLore's counter-example: the noise is larger than the gradient", loc="left", fontsize=12)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("squared norm of the exact gradient", color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    figure.savefig(path)
    return path


def run(config: Rso | Toy) -> None:
    if isinstance(config, Toy):
        toy(config)
    else:
        train(config)


if __name__ == "__main__":
    main(lambda: tyro.extras.overridable_config_cli(PRESETS, description=__doc__), run)
