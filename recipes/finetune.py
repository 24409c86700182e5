"""Fine-tune a published model on conversations, all of its parameters, with any rule.

    python -m recipes.finetune MODEL --data chats.jsonl                         MODEL: a folder as Hugging Face has them
    python -m recipes.finetune MODEL --data chats.jsonl --optimizer sumo --rank 64 --epochs 3
    python -m recipes.finetune MODEL --data chats.jsonl --general wiki.txt      what does it forget meanwhile?
    python -m recipes.finetune MODEL --data gsm8k.jsonl --prompt-field question --completion-field answer \\
        --preset sumo-gsm8k

MODEL may also be a config.json, which is enough for a plan, or a name on the Hugging Face Hub, which is then fetched
(extra hf).

The rule trains the matrices of attention and MLP, AdamW the rest. omgd, lisa and rso wrap AdamW; omgd+sumo, lisa+muon,
rso+snsm and so on wrap any other rule, whose options are flags beside their own.

Learning rates: 2e-5 for AdamW is a usual one for models of billions of parameters, and a guess for yours; small models
take more. Muon and SUMO scale their updates to AdamW's RMS (0.2), so they take AdamW's rate; masks and RSO move by
AdamW's own steps. SNSM's rate is ten times that here, as its steps are smaller by the root of the size of its subsets,
and GaLore's four times, as it multiplies its steps by a scale of 0.25: both are guesses. For SGD there is no rule.

Presets:

    sumo-gsm8k   SUMO, rank 64, batches of 32 examples, 10 epochs: arXiv 2505.24749, Tables 4 and 5 (GSM8K). It does not
                 say the learning rate, the gap, the schedule or the length: those are ours.
    sumo-mawps   SUMO, rank 128: the same, Table 7 (MAWPS, LLaMA2-7B; 32 too). It says nothing else: the rest is that of
                 sumo-gsm8k, with 3 epochs, and ours.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from models.layers import attach
from optimizers.contract import Family, Optimizer, UsageError
from optimizers.partition import trainable
from optimizers.registry import RULES
from optimizers.rules import sumo
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import duration, layers, traversal

from . import flags, hub
from .chat import ChatConfig
from .cli import main
from .config import MATRICES, Setup, Size
from .epochs import COUNTS, counted_in_steps
from .train import train
from .wrapped import ANY, OVER, WRAPPED, parts

Config = TypeVar("Config", bound=ChatConfig)
RATE = 2e-5  # AdamW's
MATCHED = "carried over from AdamW's by the RMS of an update"
GUESS = "a guess from AdamW's"
RATES: Mapping[str, tuple[float, str]] = {  # times AdamW's, and how that is known
    "adamw": (1.0, "usual for AdamW on models of billions of parameters, a guess for others"),
    "muon": (1.0, MATCHED),
    "scale": (0.2, MATCHED),
    "sumo": (1.0, MATCHED),
    "sumo_paper": (1.0, GUESS),
    "sumo_release": (1.0, GUESS),
    "galore": (4.0, GUESS),
    "sgd": (500.0, "a guess: no rule carries AdamW's over to SGD"),
}
SUBSETS = (10.0, GUESS)  # of SNSM's forms
OF_WRAPPED = {"omgd": "which it masks", "lisa": "which it masks", "rso": "which moves B"}


@dataclass(frozen=True, kw_only=True)
class Finetune(ChatConfig):
    init: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="MODEL")] = None
    """A folder with a model as Hugging Face publishes it, or its name on the Hub, such as
    HuggingFaceTB/SmolLM2-135M-Instruct; its tokenizer and chat template are the run's."""
    model: tyro.conf.Suppress[Literal["demo", "60m", "130m", "350m", "1b", "7b"]] = "demo"
    size: tyro.conf.Suppress[Size] = dataclasses.field(default_factory=Size)
    prompt: tyro.conf.Suppress[str] = ""
    field: tyro.conf.Suppress[str] = "text"
    documents: tyro.conf.Suppress[Literal["joined", "apart"]] = "joined"
    preset: Literal["none", "sumo-gsm8k", "sumo-mawps"] = "none"
    """Settings of a paper, under the flags that are given beside it: see above."""
    optimizer: str = "adamw"
    """The rule for the matrices of attention and MLP; AdamW trains the rest. Its options are the last flags here. omgd
    and lisa: AdamW for all, in a few layers at a time; rso: AdamW in random subspaces of those matrices; omgd+RULE,
    lisa+RULE, rso+RULE: the same over any of the other rules, such as omgd+sumo."""
    lr: float = RATE
    """Peak learning rate; by default what AdamW's of 2e-5 is for this rule."""
    lr_of: str = "adamw"
    sequence: int = 1024
    """Tokens per row, into which whole examples are packed."""
    micro_batch: int = 1
    """Rows that go through the model at once."""
    accumulation: int = 8
    """Micro-batches per optimizer step."""
    eval_every: int = 50
    """Steps between evaluations on held-out examples and general text; one more follows the last step."""
    eval_first: bool = True
    """Evaluate before the first step too."""
    keep_best: bool = True
    """Save a checkpoint wherever the held-out loss is the lowest so far, and keep the one where it is."""

    recipe = "finetune"
    align = True
    prefix = "optimizer"
    usual: ClassVar = {
        "": {"rank": 64, "inner_rank": 16},
        **{name: {"momentum": 0.95, "nesterov": True} for name in ("sgd", *(n for n in ANY if n.endswith("+sgd")))},
    }

    @property
    def named(self) -> str:
        return "" if self.init is None else hub.name_of(self.init)

    @classmethod
    def rules(cls) -> Mapping[str, Family[Any]]:
        return {**RULES, **WRAPPED, **ANY}

    @classmethod
    def listed(cls) -> Collection[str]:
        return [name for name in cls.rules() if OVER not in name]

    def under(self, name: str) -> "Finetune":
        """The same, at the rate that is this rule's unless --lr is given; AdamW's for what AdamW trains."""
        found: Finetune = super().under(name)
        times, _ = rate_of(name)
        return dataclasses.replace(found, lr=RATE * times, rest_lr=None if times == 1 else RATE, lr_of="adamw")

    def optimizer_for(self, setup: Setup) -> Optimizer:
        base, options = super().optimizer_for(setup), self.options
        wrapper, _ = parts(self.optimizer)
        if wrapper == "rso":
            names = [name for name in trainable(setup.params) if re.search(MATRICES, name)]
            wrapped = rso(
                base,
                setup.params,
                names,
                options.rank,
                options.period,
                setup.key,
                warmup=options.turn_warmup,
            )
            attach(setup.model, names, options.rank, "merged")
            return wrapped
        if wrapper:
            chosen, period = layers(trainable(setup.params)), duration(options.period, setup.epoch)
            again = wrapper == "lisa"
            drawn = traversal(chosen, setup.key, active=options.active, period=period, replacement=again)
            rises = options.turn_warmup
            return omgd(base, setup.params, drawn, "none" if again else "grad", turn_warmup=rises)
        return base

    def notes(self, setup: Setup, optimizer: Optimizer) -> list[str]:
        if not self.lr_of:
            return []
        why = rate_of(self.optimizer)[1]
        return [f"--lr {self.lr:g} for {self.optimizer}: {why}; try others (recipes.compare does)"]

    def check_init(self, plan: bool = False) -> None:
        if self.init is not None and self.resume == "never":
            hub.complete(self.init, begun=plan)
        super().check_init(plan)

    def check(self) -> None:
        if self.init is None:
            raise UsageError("MODEL: got none; give the folder of a model as Hugging Face publishes it")
        if not self.init.is_dir():
            raise UsageError(f"MODEL {self.init}: is no folder; give that of a model as Hugging Face publishes it")
        super().check()


def rate_of(name: str) -> tuple[float, str]:
    """What a rule's rate is times AdamW's, and how that is known."""
    wrapper, rule = parts(name)
    usual = SUBSETS if RULES[rule].options is RULES["snsm"].options else (1.0, GUESS)
    times, why = RATES.get(rule, usual)
    return times, f"{rule}'s, {OF_WRAPPED[wrapper]}; {why}" if wrapper else why


PRESETS = {
    "none": Finetune(),
    "sumo-gsm8k": Finetune(
        preset="sumo-gsm8k",
        optimizer="sumo",
        options=sumo.sumo.default(rank=64),
        sequence=512,
        pack=False,
        micro_batch=4,
        accumulation=8,
        epochs=10.0,
    ),
}
PRESETS["sumo-mawps"] = dataclasses.replace(
    PRESETS["sumo-gsm8k"], preset="sumo-mawps", options=sumo.sumo.default(rank=128), sequence=256, epochs=3.0
)


def parse(args: Sequence[str] | None = None, program: str = "") -> Finetune:
    """The config that a command line of `program` asks for. Raises UsageError."""
    words = flags.typed(args)
    named = flags.values(words).get("--preset", "none")
    if named not in PRESETS:
        raise UsageError(f"--preset: got {named!r}, expected one of {', '.join(PRESETS)}")
    return read(PRESETS[named], words, program, __doc__)


def read(config: Config, words: Sequence[str], program: str, description: str | None) -> Config:
    """`config` with what a command line asks for, which says how long in epochs or in steps, and MODEL as a folder or
    by its id. Raises UsageError."""
    config = dataclasses.replace(config, **counted_in_steps(flags.values(words), COUNTS[:1]))
    found = flags.parse(config, words, program, description)
    if found.init is None or (folder := hub.folder(found.init)) == found.init:
        return found
    tokenizer = str(folder) if found.tokenizer == str(found.init) else found.tokenizer
    return dataclasses.replace(found, init=folder, tokenizer=tokenizer)


if __name__ == "__main__":
    main(parse, train)
