"""Train a LLaMA with SUMO: exact moment orthogonalisation in an adaptive subspace (arXiv 2505.24749).

    python -m recipes.sumo demo                                    about 3 M parameters, the standard library's sources
    python -m recipes.sumo 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model
    python -m recipes.sumo condition                               condition numbers of the moments while it trains

Of pre-training the paper gives ranks, token counts and GaLore's protocol (C4, sequences of 256, batches of 512 of them,
warm-up over a tenth of the steps, cosine to a tenth of the peak, bf16, no weight decay), and, for 130M, a table over
the gap in which 250 is best. It gives no learning rate, momentum or scale: those of the presets are ours, and so are
random directions in the place of leading ones (`--basis range`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from engine.terminal.attempt import attempt
from engine.terminal.flags import ask
from optimizers.contract import Group, Params, Rule, UsageError
from optimizers.rules import sumo

from . import sumo_condition as condition
from .cli import main
from .config import TrainConfig, groups_for
from .train import train


@dataclass(frozen=True, kw_only=True)
class Sumo(TrainConfig):
    profile: Literal["recommended", "paper", "release"] = "recommended"
    """recommended; the paper's Algorithm 1; what the released code does. The options below count for the first."""
    rank: int = 48
    """Dimension of the subspace."""
    update_proj_gap: int = 200
    """Steps between two bases."""
    beta: float = 0.95
    """Decay of the moment."""
    nesterov: Literal["correct", "none", "release"] = "correct"
    """Orthogonalise the moment one step ahead, or as it is, or as the released code does."""
    basis: Literal["random", "range", "svd", "track"] = "random"
    """Random directions, away from the old ones; leading ones of the gradient, randomized or exact; or the old ones
    after one subspace iteration."""
    moments: Literal["rotate", "keep", "reset"] = "rotate"
    """What happens to the moment when the basis changes."""
    alpha: float | Literal["match"] = "match"
    """Scale of the whole step; "match" gives the part inside the RMS of a full-rank update, sqrt(min(m, n) / rank)."""
    rho: float = 1.0
    """Weight of the gradient's part outside the subspace."""
    perpendicular: Literal["raw", "normalized", "orthogonal"] = "raw"
    """That part as it is; with `rho` times the norm of the part inside; or orthogonalised too, as Muon does it."""
    orthogonalize: Literal["auto", "svd", "lq", "gram", "polar_express", "newton_schulz"] = "auto"
    """How the polar factor is computed; newton_schulz is Muon's inexact iteration."""

    recipe = "sumo"

    def groups(self, params: Params) -> list[Group]:
        return groups_for(self, rule(self), "matrices of attention and MLP")

    def check(self) -> None:
        super().check()
        self.at_least("update_proj_gap", 1)
        self.at_least("rho", 0)
        if not 0 <= self.beta < 1:
            raise UsageError(f"--beta must lie in [0, 1), got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class Condition(Sumo):
    every: int = 20
    """Steps between two measurements, each a checkpoint with the moments in it."""

    recipe = "sumo-condition"

    def groups(self, params: Params) -> list[Group]:
        watched = condition.watched(rule(self), self.beta)
        return groups_for(self, watched, "matrices of attention and MLP")


def rule(config: Sumo) -> Rule:
    """The rule for the matrices."""
    if config.profile != "recommended":
        profile = {"paper": sumo.sumo_paper, "release": sumo.sumo_release}[config.profile]
        return profile(config.rank, config.update_proj_gap)
    return sumo.sumo(
        config.rank,
        config.update_proj_gap,
        momentum=config.beta,
        nesterov=config.nesterov,
        basis=config.basis,
        moments=config.moments,
        alpha=config.alpha,
        rho=config.rho,
        perpendicular=config.perpendicular,
        orthogonalize=config.orthogonalize,
    )


def run(config: Sumo) -> None:
    """Train; for `condition`, then measure every checkpoint."""
    if not isinstance(config, Condition):
        train(config)
        return
    out = train(replace(config, save_every=config.every, keep_every=config.every, save_async="off"))
    if config.dry_run:
        return
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    console.print(f"moments      {attempt(lambda: measure(out, console), 'measured')}", soft_wrap=True)


def measure(out: Path, console: Console) -> str:
    """Print what the moments in a run's checkpoints are like, write the numbers and draw them; returns where."""
    found = condition.samples(out)
    console.print(condition.summary(found))
    picture = attempt(lambda: str(condition.draw(found, out / "condition.png")), "drawn")
    return f"{attempt(lambda: condition.write(found, out / 'condition.json'), 'written')}, {picture}"


def paper(model: Literal["60m", "130m", "350m", "1b"], rank: int, steps: int) -> Sumo:
    """The paper's rank and GaLore's protocol. Ours: lr, rest_lr, gap 250 at every size (the paper's Table 9 has it best
    for 130M and rank 256)."""
    return Sumo(
        model=model,
        lr=2.5e-3,
        rest_lr=5e-3,
        rank=rank,
        update_proj_gap=250,
        steps=steps,
        micro_batch=32,
        accumulation=16,
        precision="bf16-sr",
        eval_every=1000,
    )


PRESETS = {
    "demo": ("About 3 M parameters; lr, rest_lr and gap are ours.", Sumo(lr=6e-3, rest_lr=3e-2, update_proj_gap=50)),
    "60m": ("Rank 128, 10,000 steps.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256, 20,000 steps.", paper("130m", 256, 20_000)),
    "350m": ("Rank 256, 60,000 steps.", paper("350m", 256, 60_000)),
    "1b": ("Rank 512, 100,000 steps.", paper("1b", 512, 100_000)),
    "condition": (
        "The demo, measured: condition numbers and spectra of the moments, beside Newton-Schulz's error.",
        Condition(lr=6e-3, rest_lr=3e-2, update_proj_gap=50, steps=200, basis="range"),
    ),
}


def parse(args: Sequence[str] | None = None, program: str = "") -> Sumo:
    """The config that a command line of `program` asks for. Raises UsageError."""
    cli = tyro.extras.overridable_config_cli
    return ask(lambda prog: cli(PRESETS, args=args, description=__doc__, prog=prog), program)


if __name__ == "__main__":
    main(parse, run)
