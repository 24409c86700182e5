"""Train a LLaMA with a baseline: AdamW, SGD with momentum, Muon, GaLore or LISA.

python -m recipes.baseline                                              the demo, on the standard library's sources
python -m recipes.baseline --optimizer galore --rank 128 --model 60m --data corpus/*.jsonl.xz --tokenizer t.model
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from engine.terminal.flags import ask
from optimizers.contract import Group, Optimizer, Params, UsageError
from optimizers.partition import trainable
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import duration, layers, traversal

from .cli import main
from .config import MATRICES, Setup, TrainConfig, groups_for
from .train import train


@dataclass(frozen=True, kw_only=True)
class Baseline(TrainConfig):
    optimizer: Literal["adamw", "sgd", "muon", "galore", "lisa"] = "adamw"
    """The rule for the matrices of attention and MLP; AdamW trains the rest. lisa: AdamW for all, in a few layers at a
    time, drawn with replacement (arXiv 2403.17919); embedding, head and last norm always train."""
    match: tuple[str, ...] = (MATRICES,)
    """sgd, muon, galore: regular expressions on the names of what the rule trains; the rest is AdamW's."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw, galore, lisa: decay of the two moments."""
    momentum: float = 0.95
    """sgd, muon."""
    nesterov: bool = True
    """sgd, muon."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """muon: scale of an update; match_rms_adamw lets AdamW's learning rates carry over."""
    rank: int = 48
    """galore: dimension of the subspace."""
    update_proj_gap: int = 200
    """galore: steps between two bases."""
    scale: float = 0.25
    """galore: what an update is multiplied by."""
    moments: Literal["keep", "reset", "rotate"] = "keep"
    """galore: what happens to the moments when the basis changes."""
    active: int = 2
    """lisa: layers that train at a time."""
    period: str = "20step"
    """lisa: how long they are held, such as 20step or 1epoch. State of layers that leave is freed; its authors' code
    keeps it, as does: python -m recipes.omgd pretrain --replacement --state-policy keep."""

    recipe = "baseline"

    @property
    def trains(self) -> str:
        return self.optimizer

    def groups(self, params: Params) -> list[Group]:
        return groups(self, params)

    def optimizer_for(self, setup: Setup) -> Optimizer:
        base = super().optimizer_for(setup)
        if self.optimizer != "lisa":
            return base
        period = duration(self.period, setup.epoch)
        chosen = layers(trainable(setup.params))
        drawn = traversal(chosen, setup.key, active=self.active, period=period, replacement=True)
        return omgd(base, setup.params, drawn, "none")

    def check(self) -> None:
        super().check()
        self.at_least("update_proj_gap", 1)
        for pattern in self.match:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--match {pattern!r} is no regular expression: {error}") from None


def groups(config: Baseline, params: Params) -> list[Group]:
    """Who trains what; AdamW's groups only where something is left for them."""
    first, *rest = every_group(config)
    if config.optimizer in ("adamw", "lisa"):
        return [first, *rest]
    left = [name for name in params if not any(re.search(pattern, name) for pattern in config.match)]
    norms, others = [n for n in left if "norm" in n], [n for n in left if "norm" not in n]
    return [first] + [group for group, own in zip(rest, (norms, others), strict=True) if own]


def every_group(config: Baseline) -> list[Group]:
    """The rule's group, then AdamW's."""
    why = "matrices of attention and MLP" if config.match == (MATRICES,) else "asked for by --match"
    match config.optimizer:
        case "adamw" | "lisa":
            return groups_for(config, adamw(config.betas), "everything else")
        case "sgd":
            return groups_for(
                config, sgd(config.momentum, config.nesterov), "matrices of attention and MLP", config.match
            )
        case "muon":
            rule = muon(config.momentum, config.nesterov, adjust_lr=config.adjust_lr)
            return groups_for(config, rule, why, config.match)
        case "galore":
            rule = galore(config.rank, config.update_proj_gap, config.scale, config.betas, moments=config.moments)
            return groups_for(config, rule, why, config.match)


def parse(args: Sequence[str] | None = None, program: str = "") -> Baseline:
    """The config that a command line of `program` asks for. Raises UsageError."""
    return ask(lambda prog: tyro.cli(Baseline, args=args, description=__doc__, prog=prog), program)


if __name__ == "__main__":
    main(parse, train)
