"""Train a LLaMA with one rule: AdamW, SGD with momentum, Muon, GaLore, any other that is registered, or LISA.

python -m recipes.baseline                                              the demo, on the standard library's sources
python -m recipes.baseline --optimizer galore --rank 128 --model 60m --data corpus/*.jsonl.xz --tokenizer t.model
python -m recipes.baseline --optimizer galore --help                    its options among the flags
python -m recipes.baseline glue --task rte --init MODEL --data FOLDER   fine-tune an encoder on a task of GLUE
python -m recipes.baseline masked --init MODEL --data TEXT              an encoder says the tokens hidden from it
python -m recipes.baseline gpt2                                         a GPT-2 of 11 M parameters; gpt2-paper: 124 M
python -m recipes.baseline resnet --data cifar-10-batches-py            a ResNet-20 on images; or: vit
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from optimizers.contract import Family, Group, Optimizer, Params, Rule, UsageError
from optimizers.registry import RULES
from optimizers.rules.adamw import AdamW, adamw
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import duration, traversal

from . import flags, gpt2, vision
from .cli import main
from .config import Setup, TrainConfig, groups_for
from .epochs import commands
from .glue import HERE, OMGD_BATCHES, OMGD_RATES, GlueConfig, of_table
from .masked import MaskedConfig
from .train import train
from .vision import ResnetConfig, VitConfig


@dataclass(frozen=True)
class Lisa(AdamW):
    """AdamW's settings, and which layers it trains."""

    active: int = 2
    """Layers that train at a time."""
    period: str = "20step"
    """How long they are held, such as 20step or 1epoch. State of layers that leave is freed; its authors' code keeps
    it, as does: python -m recipes.omgd pretrain --replacement --state-policy keep."""
    turn_warmup: int = 0
    """Steps over which the learning rate of a layer rises when it trains again (ours)."""


def _lisa(name: str, options: Lisa) -> Rule:
    if options.turn_warmup < 0:
        raise UsageError(f"lisa: turn_warmup: got {options.turn_warmup}, expected a number of steps, at least 0")
    return adamw(options.betas, options.eps)


lisa = Family("lisa", Lisa, _lisa)


@dataclass(frozen=True, kw_only=True)
class Baseline(TrainConfig):
    optimizer: str = "adamw"
    """The rule for the matrices of attention and MLP; AdamW trains the rest. Its options are the last flags here.
    lisa: AdamW for all, in a few layers at a time, drawn with replacement (arXiv 2403.17919); embedding, head and last
    norm always train."""
    match: tuple[str, ...] = ()
    """Regular expressions on the names of what the rule trains; the rest is AdamW's. By default the matrices of
    attention and MLP."""

    recipe = "baseline"

    @classmethod
    def rules(cls) -> Mapping[str, Family[Any]]:
        return {**RULES, "lisa": lisa}

    def groups(self, params: Params) -> list[Group]:
        return groups_for(self, self.rule(), params, self.match)

    def optimizer_for(self, setup: Setup) -> Optimizer:
        base = super().optimizer_for(setup)
        if self.optimizer != "lisa":
            return base
        period = duration(self.options.period, setup.epoch)
        chosen = self.layers(setup.params)
        drawn = traversal(chosen, setup.key, active=self.options.active, period=period, replacement=True)
        return omgd(base, setup.params, drawn, "none", turn_warmup=self.options.turn_warmup)

    def check(self) -> None:
        super().check()
        for pattern in self.match:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--match {pattern!r} is no regular expression: {error}") from None
        if (
            self.match not in ((), (self.matrices,))
            and self.rule().name == "adamw"
            and (self.rest_lr, self.rest) == (None, "adamw")
        ):
            raise UsageError("--match: AdamW trains everything here, all at --lr; give --rest-lr, or leave --match out")


@dataclass(frozen=True, kw_only=True)
class Glue(GlueConfig, Baseline):
    recipe = "baseline-glue"

    @classmethod
    def published(cls, task: str) -> Mapping[str, Any]:
        """Learning rates and batches of OMGD's Table 7 (arXiv 2603.05960), which does not say that they are full
        fine-tuning's; 30 epochs, rows of 512, and by its code no warm-up, a linear decay, no weight decay."""
        return of_table(task, OMGD_RATES, OMGD_BATCHES, "arXiv 2603.05960, Table 7,")


@dataclass(frozen=True, kw_only=True)
class Masked(MaskedConfig, Baseline):
    recipe = "baseline-masked"


@dataclass(frozen=True, kw_only=True)
class Gpt2(gpt2.Gpt2Train, Baseline):
    recipe = "baseline-gpt2"


@dataclass(frozen=True, kw_only=True)
class Resnet(ResnetConfig, Baseline):
    match: tyro.conf.Suppress[tuple[str, ...]] = ()

    recipe = "baseline-resnet"

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """SGDM of arXiv 2603.05960, Table 4: Nesterov momentum of 0.9, lr 0.1, 200 epochs of batches of 256 (ImageNet,
        ResNet-18: 100 of 512); by its code rates fall at 1/2 and 3/4 (CIFAR-100: at 60, 120, 150, to a fifth)."""
        return {**vision.RESNETS[preset], "options": RULES["sgd"].default(momentum=0.9, nesterov=True)}


@dataclass(frozen=True, kw_only=True)
class Vit(VitConfig, Baseline):
    match: tyro.conf.Suppress[tuple[str, ...]] = ()

    recipe = "baseline-vit"

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """AdamW of arXiv 2603.05960, Table 5: 1e-4, decay 1e-4, batches of 512, times 0.95 every 2 epochs, of
        vit-base-patch16-224-in21k (--init)."""
        return vision.vits(preset)


PRESETS: Mapping[str, tuple[str, Any]] = {
    "glue": ("Fine-tune a BERT or RoBERTa on a task of GLUE; lr ours, not tuned.", Glue(**HERE, lr=1e-4)),
    "masked": ("Train a masked language model, from a BERT or RoBERTa; lr ours, not tuned.", Masked(**HERE, lr=1e-4)),
    "gpt2": ("Train a GPT-2 of 11 M parameters; settings ours, lr not tuned: see recipes/gpt2.py.", Gpt2(**gpt2.HERE)),
    "gpt2-paper": ("The GPT-2 of OMGD (section 5.4) under full AdamW; see recipes/gpt2.py.", Gpt2(**gpt2.PAPER)),
    "resnet": ("Train a ResNet on images; lr and schedule ours, not tuned.", Resnet(**vision.SMALL_RESNET)),
    "vit": ("Train a ViT on images; lr ours, not tuned.", Vit(**vision.SMALL_VIT)),
}


def parse(args: Sequence[str] | None = None, program: str = "") -> Baseline:
    """The config that a command line of `program` asks for. Raises UsageError."""
    words = flags.typed(args)
    if words and words[0] in PRESETS:
        found: Baseline = flags.parse_presets(commands(PRESETS, words), words, program, __doc__)
        return found
    return flags.parse(Baseline(), words, program, __doc__)


if __name__ == "__main__":
    main(parse, train)
