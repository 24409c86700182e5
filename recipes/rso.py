"""Train a LLaMA with randomized subspace optimization (RSO, arXiv 2502.07222), any rule as its inner solver.

    python -m recipes.rso demo                                     about 3 M parameters, the standard library's sources
    python -m recipes.rso demo --optimizer snsm --share            another inner rule; q, k, v share a P
    python -m recipes.rso 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model
    python -m recipes.rso glue --task rte --init MODEL --data FOLDER       a BERT or RoBERTa, on a task of GLUE
    python -m recipes.rso toy                                      the theory's bound, and where GaLore gets stuck

The paper's pre-training settings could not be read: its steps per subproblem, learning rates, ranks and the layers it
treats were NOT FOUND. Ranks and periods here are GaLore's for the same models (128, 256, 256, 512 and 1024; 200, and
500 for 7B), the protocol is that of the paper's third-party reproduction (arXiv 2602.23111): C4, sequences of 256,
batches of 512 of them, bf16, warm-up over a tenth of the steps, cosine to a tenth of the peak, no decay. Learning
rates are ours: the update has the size of the inner rule's, so dense AdamW's rates are where to look.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from models.layers import attach
from optimizers.contract import Group, Optimizer, Params
from optimizers.partition import trainable
from optimizers.wrappers.rso import SHARED, rso

from . import flags
from .cli import main
from .config import Setup, TrainConfig
from .epochs import commands
from .glue import HERE, TASKS, GlueConfig, of_table
from .rest import rest_for
from .rso_toy import Toy, toy
from .train import train


@dataclass(frozen=True, kw_only=True)
class Rso(TrainConfig):
    optimizer: str = "adamw"
    """The inner rule: the one that moves B, for the matrices of attention and MLP; AdamW trains the rest, its state
    never reset. Its options are the last flags here; those that RSO has too are --inner-rank and so on. --inner is
    another name of this flag."""
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
    """Steps over which the learning rate of B rises after each P, and at the start (ours)."""
    prox: float = 0.0
    """1/eta of the penalty ||B||²/(2 eta); 0 leaves it out, as public code does."""

    recipe = "rso"
    prefix = "inner"
    also: ClassVar = {"inner": "optimizer"}
    usual: ClassVar = {"": {"rank": 12, "update_proj_gap": 50}, "sgd": {"momentum": 0.95}}

    def groups(self, params: Params) -> list[Group]:
        """The inner rule on attention and MLP; AdamW on the rest, at the same learning rate unless told otherwise."""
        why, rule = f"attention and MLP, in subspaces of rank {self.rank}", self.rule()
        own = Group("rso", rule, (self.matrices,), self.lr, self.weight_decay, why)
        return [own, *rest_for(self, params, rule, own.match)]

    def optimizer_for(self, setup: Setup) -> Optimizer:
        """RSO over the groups' rules, and slots for P and B in the model."""
        names = [name for name in trainable(setup.params) if re.search(self.matrices, name)]
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


@dataclass(frozen=True, kw_only=True)
class Glue(GlueConfig, Rso):
    recipe = "rso-glue"
    usual: ClassVar = {**Rso.usual, "": {"rank": 1, "update_proj_gap": 50}}  # of B, which has 4 columns

    @classmethod
    def published(cls, task: str) -> Mapping[str, Any]:
        """RSO's own settings for GLUE were NOT FOUND. Rank 4, batches of 16 and 30 epochs are its reproduction's (arXiv
        2602.23111), 500 steps a subproblem those of GoLore, by the same group. Ours: a learning rate of 1e-5, the
        lowest of that reproduction's own method."""
        own = of_table(task, dict.fromkeys(TASKS, 1.0), {}, "arXiv 2602.23111")
        return {**own, "rank": 4, "period": 500}


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
    "glue": (
        "Fine-tune a BERT or RoBERTa on a task of GLUE, rank 4, a new P every 50 steps; both and lr ours, not tuned.",
        Glue(**HERE, lr=3e-4, rank=4, period=50),
    ),
    "toy": ("No model: least squares against the theory's bound, and GaLore's counter-example.", Toy()),
}


def run(config: Rso | Toy) -> None:
    if isinstance(config, Toy):
        toy(config)
    else:
        train(config)


def parse(args: Sequence[str] | None = None, program: str = "") -> Rso | Toy:
    """The config that a command line of `program` asks for. Raises UsageError."""
    found: Rso | Toy = flags.parse_presets(commands(PRESETS, args), args, program, __doc__)
    return found


if __name__ == "__main__":
    main(parse, run)
