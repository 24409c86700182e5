"""Train a LLaMA with Subset-Norm and Subspace-Momentum (arXiv 2411.07120).

    python -m recipes.snsm demo                                    about 3 M parameters, the standard library's sources
    python -m recipes.snsm 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model        the paper's setting
    python -m recipes.snsm 60m --method adam_sn --data ...         Subset-Norm alone

Presets are the authors' settings where they published any (their 60M commands, their 1B figure), else marked inferred.
Their protocol: C4, sequences of 256, batches of 512 of them, warm-up over a tenth of the steps, cosine to a tenth of
the peak, global-norm clipping at 1, no weight decay, bf16 throughout (here second moments are fp32).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from engine.terminal.flags import ask
from optimizers.contract import Group, Params, Rule, UsageError
from optimizers.rules import snsm
from optimizers.rules.adamw import adamw

from .cli import main
from .config import MATRICES, TrainConfig
from .train import train

LINEAR = (MATRICES, r"lm_head\.weight$")  # every Linear weight, the head among them, as the authors do


@dataclass(frozen=True, kw_only=True)
class Snsm(TrainConfig):
    method: Literal["snsm", "adam_snsm", "adagrad_snsm", "adam_sn", "adagrad_sn", "rmsprop_sn", "adam_sm", "sgd_sm"] = (
        "snsm"
    )
    """The paper's names: SN is Subset-Norm alone, SM Subspace-Momentum alone."""
    rank: int = 48
    """Dimension of the momentum's subspace; the authors take about a quarter of the hidden size."""
    update_proj_gap: int = 200
    """Steps between two bases."""
    proj_type: Literal["auto", "svd", "range", "random", "srht", "topk", "uniform"] = "auto"
    """Projection: leading singular directions (exact, randomized, or the cheaper of the two), others, or slices."""
    subset: str = "heuristic"
    """Which entries share a step size: heuristic (a row or a column), sqrt, a size K, or -q for sqrt(size)/q."""
    moments: Literal["reset", "keep", "rotate"] = "reset"
    """What happens to the momentum when the basis changes."""
    correct_complement: bool = True
    """Let bias correction also multiply the part of the gradient outside the subspace, as the authors do."""
    head: bool = True
    """Train the head with the method too, as the authors do; else with AdamW."""

    recipe = "snsm"

    def groups(self, params: Params) -> list[Group]:
        return groups(self, params)

    def check(self) -> None:
        super().check()
        self.at_least("update_proj_gap", 1)

    @property
    def trains(self) -> str:
        return self.method


def rule(config: Snsm) -> Rule:
    """The rule for the matrices."""
    try:
        subset = config.subset if config.subset in ("heuristic", "sqrt") else int(config.subset)
    except ValueError:
        raise UsageError(f"--subset must be heuristic, sqrt or a whole number, got {config.subset!r}") from None
    if config.method in ("adam_sn", "adagrad_sn", "rmsprop_sn"):
        return getattr(snsm, config.method)(subset=subset)
    options: dict[str, object] = {
        "proj_type": config.proj_type,
        "moments": config.moments,
        "correct_complement": config.correct_complement,
    }
    if config.method not in ("adam_sm", "sgd_sm"):
        options["subset"] = subset
    return getattr(snsm, config.method)(config.rank, config.update_proj_gap, **options)


def groups(config: Snsm, params: Params) -> list[Group]:
    """The method on Linear weights; Adam on the rest, at the same learning rate unless told otherwise."""
    rest = config.lr if config.rest_lr is None else config.rest_lr
    linear = LINEAR if config.head and "lm_head.weight" in params else LINEAR[:1]
    return [
        Group(config.method, rule(config), linear, config.lr, config.weight_decay, "Linear weights"),
        Group("adamw-norms", adamw(eps=1e-6), ("norm",), rest, 0.0, "norms: vectors, never decayed"),
        Group("adamw", adamw(eps=1e-6), ("",), rest, config.weight_decay, "the rest: rows looked up, not a map"),
    ]


def paper(model: Literal["60m", "130m", "350m", "1b"], rank: int, steps: int, gap: int = 100) -> Snsm:
    """The authors' common settings: lr 5e-2 for all groups (their 60M command, "works for larger models"), clip 1.0."""
    return Snsm(
        model=model,
        method="adam_snsm",
        lr=5e-2,
        rank=rank,
        update_proj_gap=gap,
        steps=steps,
        micro_batch=32,
        accumulation=16,
        clip="global",
        precision="bf16-sr",
        eval_every=1000,
    )


PRESETS = {
    "demo": (
        "About 3 M parameters; rates and gap are ours, tuned on Wikipedia (docs/results/snsm-wikipedia).",
        Snsm(lr=1.5e-2, rest_lr=3e-2, update_proj_gap=50),
    ),
    "60m": ("Rank 128, gap 100, 10,000 steps: the authors' 60M command.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256 (inferred from GaLore's), 20,000 steps (GaLore's script).", paper("130m", 256, 20_000)),
    "350m": ("Rank 256 (inferred from GaLore's), 60,000 steps (GaLore's script).", paper("350m", 256, 60_000)),
    "1b": ("Rank 512 (from the printed memory), 100,000 steps (their figure).", paper("1b", 512, 100_000)),
}


def parse(args: Sequence[str] | None = None, program: str = "") -> Snsm:
    """The config that a command line of `program` asks for. Raises UsageError."""
    cli = tyro.extras.overridable_config_cli
    return ask(lambda prog: cli(PRESETS, args=args, description=__doc__, prog=prog), program)


if __name__ == "__main__":
    main(parse, train)
