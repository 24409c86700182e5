"""RSO's toys: least squares against the theory's bound, and the problem on which GaLore gets stuck (arXiv 2502.07222).

P stands at the left of X here, as in the paper: X is the transpose of a weight.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.checkpoint.lock import claim
from engine.curves import COLOURS, FAINT, INK, save, spread
from engine.terminal.attempt import attempt
from optimizers.apply import refresh, update
from optimizers.contract import Group, Hyper, Params, UsageError
from optimizers.linalg import lift, project, svd_basis
from optimizers.partition import partition
from optimizers.random import fold, normal, signs
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.subspace import draw


@dataclass(frozen=True)
class Toy:
    steps: int = 40_000
    """Of each method in the counter-example."""
    seed: int = 0
    """Of the problems and of every draw."""
    out: Path = Path("runs/rso-toy")
    """Folder for the picture."""


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
            if optimizer.switches(step):
                params, state = optimizer.switch(params, state, step, self.key)
            grads = {"x.B": g @ state["x.weight"]["P"]} if inside else {"x.weight": g}
            state, _ = refresh(optimizer, grads, state, step, self.key)
            params, state = update(optimizer, grads, state, params, hyper)
        norms.append(float(self.gradient(params["x.weight"].T).square().sum()))
        return norms


METHODS = ("SGD", "GaLore, SGD", "GaLore, Adam", "RSO haar", "RSO gaussian", "RSO coordinate")


def toy(config: Toy) -> None:
    """Both toy problems: two tables and a picture."""
    if config.steps < 100:
        raise UsageError(f"--steps must be at least 100, got {config.steps}")
    with claim(config.out):  # before the work
        _toy(config)


def _toy(config: Toy) -> None:
    """In a folder that is this process's own."""
    console = Console(soft_wrap=True, markup=False, emoji=False)
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
    drawn = attempt(lambda: str(picture(config.out / "counterexample.png", curves, every)), "drawn")
    console.print(f"picture {drawn}", highlight=False)


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
    save(figure, path)
    return path
