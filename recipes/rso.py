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

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from engine.terminal.flags import ask
from models.layers import attach
from optimizers.contract import Group, Optimizer, Params, Rule
from optimizers.partition import trainable
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.wrappers.rso import SHARED, rso

from .cli import main
from .config import MATRICES, Setup, TrainConfig, rest_for
from .rso_toy import Toy, toy
from .train import train


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
    turn_warmup: int = 0
    """Steps over which the learning rate of B rises after each P."""
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
        names = [name for name in trainable(setup.params) if re.search(MATRICES, name)]
        base, share = super().optimizer_for(setup), SHARED if self.share else ()
        subspaces = (
            self.rank,
            self.period,
            setup.key,
            self.form,
            self.projection,
            share,
            self.moments,
            self.prox,
            self.turn_warmup,
        )
        wrapped = rso(base, setup.params, names, *subspaces)
        attach(setup.model, names, self.rank, self.form)
        return wrapped

    def check(self) -> None:
        super().check()
        self.at_least("period", 1)
        self.at_least("prox", 0)
        self.at_least("turn_warmup", 0)
        self.at_least("update_proj_gap", 1)

    @property
    def trains(self) -> str:
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


PRESETS: dict[str, tuple[str, Rso | Toy]] = {
    "demo": ("About 3 M parameters; a quarter of the hidden size as rank, lr ours.", Rso(lr=3e-3)),
    "60m": ("Rank 128, 10,000 steps: GaLore's; lr ours.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256, 20,000 steps: GaLore's; lr ours.", paper("130m", 256, 20_000)),
    "350m": ("Rank 256, 60,000 steps: GaLore's; lr ours.", paper("350m", 256, 60_000)),
    "1b": ("Rank 512 (GaLore's table; its script has 1024), 100,000 steps; lr ours.", paper("1b", 512, 100_000)),
    "7b": ("Rank 1024, a new P every 500 of 150,000 steps: GaLore's; lr ours.", paper("7b", 1024, 150_000, 500)),
    "toy": ("No model: least squares against the theory's bound, and GaLore's counter-example.", Toy()),
}


def run(config: Rso | Toy) -> None:
    if isinstance(config, Toy):
        toy(config)
    else:
        train(config)


def parse(args: Sequence[str] | None = None, program: str = "") -> Rso | Toy:
    """The config that a command line of `program` asks for. Raises UsageError."""
    cli = tyro.extras.overridable_config_cli
    return ask(lambda prog: cli(PRESETS, args=args, description=__doc__, prog=prog), program)


if __name__ == "__main__":
    main(parse, run)
