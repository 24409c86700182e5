"""Train a LLaMA with SUMO: exact moment orthogonalisation in an adaptive subspace (arXiv 2505.24749).

    python -m recipes.sumo demo                                    about 3 M parameters, the standard library's sources
    python -m recipes.sumo 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model
    python -m recipes.sumo glue --task rte --init MODEL --data FOLDER      a BERT or RoBERTa, on a task of GLUE
    python -m recipes.sumo condition                               condition numbers of the moments while it trains

Of pre-training the paper gives ranks, token counts and GaLore's protocol (C4, sequences of 256, batches of 512 of them,
warm-up over a tenth of the steps, cosine to a tenth of the peak, bf16, no weight decay), and, for 130M, a table over
the gap in which 250 is best. It gives no learning rate, momentum or scale: those of the presets are ours, and so are
random directions in the place of leading ones (`--basis range`).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console

from engine.terminal.attempt import attempt
from optimizers.contract import Family, Group, Params
from optimizers.registry import RULES
from optimizers.rules import sumo as rules

from . import flags
from . import sumo_condition as condition
from .cli import main
from .config import TrainConfig, groups_for
from .epochs import commands
from .glue import HERE, GlueConfig, of_table
from .train import train


@dataclass(frozen=True, kw_only=True)
class Sumo(TrainConfig):
    optimizer: str = "sumo"
    """The rule for the matrices of attention and MLP; AdamW trains the rest. sumo is what we recommend, sumo_paper the
    paper's Algorithm 1, sumo_release what the released code does; any other rule can stand in their place. Its options
    are the last flags here. --profile recommended, paper and release are other names of the three, --beta is one of
    --momentum."""

    recipe = "sumo"
    also: ClassVar = {"beta": "momentum"}
    spelled: ClassVar = {"profile": {"recommended": "sumo", "paper": "sumo_paper", "release": "sumo_release"}}

    @property
    def trains(self) -> str:
        return "" if self.optimizer == "sumo" else self.optimizer


@dataclass(frozen=True, kw_only=True)
class Glue(GlueConfig, Sumo):
    optimizer: str = "sumo"
    """The rule for queries, keys, values and the first matrix of an MLP, as the released code has it; AdamW trains the
    rest. sumo_paper, sumo_release and any other rule can stand in its place; its options are the last flags here."""

    recipe = "sumo-glue"
    matrices = r"\blayer\.\d+\..*(query|key|value|intermediate\.dense)\.weight$"

    @classmethod
    def published(cls, task: str) -> Mapping[str, Any]:
        """arXiv 2505.24749. Tables 10 and 11 (GaLore's): learning rates and a scale of 4 at rank 4, batches, 30 epochs,
        rows of 512. Its code: which matrices, no warm-up, a linear decay, AdamW's 1e-5 for the rest (constant there,
        decayed here). Inferred: the gap of 500, GaLore's example."""
        own = of_table(task, RATES, {"cola": 32}, "arXiv 2505.24749, Table 10,")
        options = rules.sumo_paper.default(rank=4, update_proj_gap=500, alpha=4.0)
        return {**own, "rest_lr": 1e-5, "optimizer": "sumo_paper", "options": options}


RATES = {"cola": 3.0, "stsb": 1.0, "mrpc": 3.0, "rte": 1.0, "sst2": 1.0, "mnli": 1.0, "qnli": 1.0, "qqp": 1.0}  # 1e-5


@dataclass(frozen=True, kw_only=True)
class Condition(Sumo):
    every: int = 20
    """Steps between two measurements, each a checkpoint with the moments in it."""

    recipe = "sumo-condition"

    @classmethod
    def rules(cls) -> Mapping[str, Family[Any]]:
        """Those whose moment can be measured."""
        return {name: family for name, family in RULES.items() if family.options is rules.Sumo}

    def groups(self, params: Params) -> list[Group]:
        return groups_for(self, condition.watched(self.rule(), self.options.momentum), params)


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
        options=rules.sumo.default(rank=rank, update_proj_gap=250),
        steps=steps,
        micro_batch=32,
        accumulation=16,
        precision="bf16-sr",
        eval_every=1000,
    )


PRESETS: dict[str, tuple[str, Sumo]] = {
    "demo": (
        "About 3 M parameters; lr, rest_lr and gap are ours.",
        Sumo(lr=6e-3, rest_lr=3e-2, options=rules.sumo.default(rank=48, update_proj_gap=50)),
    ),
    "60m": ("Rank 128, 10,000 steps.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256, 20,000 steps.", paper("130m", 256, 20_000)),
    "350m": ("Rank 256, 60,000 steps.", paper("350m", 256, 60_000)),
    "1b": ("Rank 512, 100,000 steps.", paper("1b", 512, 100_000)),
    "glue": (
        "Fine-tune a BERT or RoBERTa on a task of GLUE, rank 4; gap and lr ours, not tuned.",
        Glue(**HERE, lr=1e-4, options=rules.sumo.default(rank=4, update_proj_gap=50)),
    ),
    "condition": (
        "The demo, measured: condition numbers and spectra of the moments, beside Newton-Schulz's error.",
        Condition(
            lr=6e-3, rest_lr=3e-2, steps=200, options=rules.sumo.default(rank=48, update_proj_gap=50, basis="range")
        ),
    ),
}


def parse(args: Sequence[str] | None = None, program: str = "") -> Sumo:
    """The config that a command line of `program` asks for. Raises UsageError."""
    found: Sumo = flags.parse_presets(commands(PRESETS, args), args, program, __doc__)
    return found


if __name__ == "__main__":
    main(parse, run)
