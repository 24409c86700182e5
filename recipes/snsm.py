"""Train a LLaMA with Subset-Norm and Subspace-Momentum (arXiv 2411.07120).

    python -m recipes.snsm demo                                    about 3 M parameters, the standard library's sources
    python -m recipes.snsm 60m --data corpus/*.jsonl.xz --tokenizer tokenizer.model        the paper's setting
    python -m recipes.snsm 60m --optimizer adam_sn --data ...      Subset-Norm alone
    python -m recipes.snsm vit --data mnist                        a small ViT on images

Presets are the authors' settings where they published any (their 60M commands, their 1B figure), else marked inferred.
Their protocol: C4, sequences of 256, batches of 512 of them, warm-up over a tenth of the steps, cosine to a tenth of
the peak, global-norm clipping at 1, no weight decay, bf16 throughout (here second moments are fp32).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from optimizers.contract import Group, Params, Rule, UsageError
from optimizers.rules.snsm import adam_snsm, snsm

from . import flags, vision
from .cli import main
from .config import TrainConfig
from .epochs import commands
from .rest import rest_for
from .train import train
from .vision import Body, VitConfig

HEAD = r"lm_head\.weight$"


@dataclass(frozen=True, kw_only=True)
class Snsm(TrainConfig):
    optimizer: str = "snsm"
    """The rule for Linear weights. The paper's names: adam_snsm and adagrad_snsm are the whole method, adam_sn,
    adagrad_sn and rmsprop_sn Subset-Norm alone, adam_sm and sgd_sm Subspace-Momentum alone; any other rule can stand in
    their place. Its options are the last flags here. --method is another name of this flag."""
    head: bool = True
    """Train the head with the rule too, as the authors do; else with AdamW."""

    recipe = "snsm"
    also: ClassVar = {"method": "optimizer"}
    usual: ClassVar = {**TrainConfig.usual, "": {"rank": 48, "proj_type": "auto"}}

    def groups(self, params: Params) -> list[Group]:
        return groups(self, self.rule(), params, self.head)


@dataclass(frozen=True, kw_only=True)
class Vit(VitConfig, Snsm):
    optimizer: str = "snsm"
    """The rule for Linear weights, by the names of the paper or any other; Adam trains the rest. Its options are the
    last flags here. --method is another name of this flag."""
    head: bool = False
    """Train the classifier with the rule too, whose --rank must then fit the number of classes; else with Adam."""

    recipe = "snsm-vit"
    usual: ClassVar = {**Snsm.usual, "": {"rank": 16, "update_proj_gap": 50, "proj_type": "auto"}}

    def groups(self, params: Params) -> list[Group]:
        linear, rule = (self.matrices, *((r"^classifier\.weight$",) if self.head else ())), self.rule()
        own = Group(rule.name, rule, linear, self.lr, self.weight_decay, "Linear weights")
        return [own, *rest_for(self, params, rule, linear, 1e-6)]

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """The authors' script for CIFAR, from scratch: a ViT-base of 224 pixels, reflections, batches of 64, 10 epochs,
        no decay; AdamSNSM at 1e-3, rank 64, gap 1000. Ours: the schedule, and pixels normed by halves."""
        if preset == "imagenet":
            raise UsageError("--preset imagenet: SNSM's authors have a ViT on cifar10 and cifar100; name one of these")
        return {
            "lr": 1e-3,
            "options": adam_snsm.default(rank=64, update_proj_gap=1000, proj_type="auto"),
            "optimizer": "adam_snsm",
            "epochs": 10.0,
            "micro_batch": 64,
            "augment": "flip",
            "image_size": 224,
            "body": Body(768, 12, 12, 3072, 16),
        }


def groups(config: TrainConfig, rule: Rule, params: Params, head: bool = True) -> list[Group]:
    """The rule on Linear weights; Adam on the rest, at the same learning rate unless told otherwise."""
    linear = (config.matrices, *((HEAD,) if head and "lm_head.weight" in params else ()))
    own = Group(rule.name, rule, linear, config.lr, config.weight_decay, "Linear weights")
    return [own, *rest_for(config, params, rule, linear, 1e-6)]


def paper(model: Literal["60m", "130m", "350m", "1b"], rank: int, steps: int, gap: int = 100) -> Snsm:
    """The authors' common settings: lr 5e-2 for all groups (their 60M command, "works for larger models"), clip 1.0."""
    return Snsm(
        model=model,
        optimizer="adam_snsm",
        options=adam_snsm.default(rank=rank, update_proj_gap=gap, proj_type="auto"),
        lr=5e-2,
        steps=steps,
        micro_batch=32,
        accumulation=16,
        clip="global",
        precision="bf16-sr",
        eval_every=1000,
    )


PRESETS: dict[str, tuple[str, Snsm]] = {
    "demo": (
        "About 3 M parameters; rates and gap are ours, tuned on Wikipedia (docs/results/snsm-wikipedia).",
        Snsm(lr=1.5e-2, rest_lr=3e-2, options=snsm.default(rank=48, update_proj_gap=50)),
    ),
    "60m": ("Rank 128, gap 100, 10,000 steps: the authors' 60M command.", paper("60m", 128, 10_000)),
    "130m": ("Rank 256 (inferred from GaLore's), 20,000 steps (GaLore's script).", paper("130m", 256, 20_000)),
    "350m": ("Rank 256 (inferred from GaLore's), 60,000 steps (GaLore's script).", paper("350m", 256, 60_000)),
    "1b": ("Rank 512 (from the printed memory), 100,000 steps (their figure).", paper("1b", 512, 100_000)),
    "vit": (
        "Train a ViT on images; lr, rank and gap ours, not tuned.",
        Vit(**{**vision.SMALL_VIT, "lr": 1e-2, "rest_lr": 1e-3}),
    ),
}


def parse(args: Sequence[str] | None = None, program: str = "") -> Snsm:
    """The config that a command line of `program` asks for. Raises UsageError."""
    found: Snsm = flags.parse_presets(commands(PRESETS, args), args, program, __doc__)
    return found


if __name__ == "__main__":
    main(parse, train)
