"""Mask traversal (arXiv 2603.05960): only some layers train at a time, drawn without replacement.

    python -m recipes.omgd toy                     the paper's linear regression: which masks converge at which rate
    python -m recipes.omgd pretrain                a LLaMA, 2 of 6 layers at a time, on the standard library's sources
    python -m recipes.omgd pretrain --optimizer snsm --active 3 --period 1epoch --model 130m --data corpus/*.jsonl.xz
    python -m recipes.omgd glue --task rte --init MODEL --data FOLDER       a BERT or RoBERTa, on a task of GLUE
    python -m recipes.omgd gpt2                    a GPT-2 of 11 M parameters; gpt2-paper: the paper's
    python -m recipes.omgd resnet --data cifar-10-batches-py                half of a ResNet-20's tensors at a time
    python -m recipes.omgd vit --data mnist                                 a small ViT, 2 of 6 layers at a time
    python -m recipes.omgd memory                  what training LLaMA-7B holds, as the paper counts and as this engine

`pretrain --replacement` is LISA (also `python -m recipes.baseline --optimizer lisa`).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from models.llama import PRESETS, Llama
from optimizers.contract import Group, Optimizer, Params, State, UsageError, state_bytes
from optimizers.partition import partition, trainable
from optimizers.random import Key
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.snsm import Snsm
from optimizers.wrappers.choice import Choice, describe
from optimizers.wrappers.norms import NormMasks, norm_masks
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import coordinates, duration, gives_up, layers, tensors, traversal

from . import flags, gpt2, snsm, vision
from .cli import main
from .config import MATRICES, Setup, TrainConfig
from .epochs import commands
from .glue import HERE, OMGD_BATCHES, OMGD_RATES, GlueConfig, of_table
from .omgd_toy import Toy, toy
from .train import train
from .vision import ResnetConfig, VitConfig

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainConfig):
    """Train a LLaMA with masks over any rule."""

    optimizer: str = "adamw"
    """The rule that masks choose for, on the matrices of attention and MLP; AdamW trains the rest. Its options are the
    last flags here. --over is another name of this flag."""
    by: Literal["layers", "tensors", "coordinates"] = "layers"
    """What a mask chooses among. Embedding, head and last norm always train when that is layers."""
    active: int = 2
    """layers: how many train at a time."""
    keep: float = 0.5
    """tensors, coordinates: the share that trains at a time."""
    balance: Literal["count", "numel"] = "count"
    """tensors: masks of equally many tensors, or of about equally many elements."""
    match: tuple[str, ...] = ()
    """tensors, coordinates: regular expressions on the names of what is masked. Without any: every tensor, and the
    matrices of attention and MLP."""
    choose: Literal["traversal", "norms"] = "traversal"
    """How layers are chosen: each once a cycle, as OMGD does; or each period anew, first those that never trained, then
    by the gradient norms seen so far (ours; whether it trains better was not measured)."""
    period: str = "100step"
    """How long a mask is held: 1epoch, 2epoch, 100step. Only whole epochs pair every sample with every mask."""
    order: Literal["epochwise", "joint"] = "epochwise"
    """joint: the pairs of (mask, batch) of a cycle in random order. A mask a step: needs --state-policy keep."""
    remainder: Literal["short", "reset"] = "short"
    """Layers left over when --active does not divide: a mask of their own, or skipped this cycle (Algorithm 2)."""
    reshuffle: bool = True
    """Draw new masks each cycle."""
    replacement: bool = False
    """Draw each mask from all layers, whatever trained before (LISA)."""
    scale_mode: Literal["grad", "none", "update"] | None = None
    """What is multiplied by the number of masks: gradients (as in the paper; under AdamW it all but cancels), nothing
    (by default with --replacement), or updates."""
    state_policy: Literal["drop", "keep", "offload"] = "drop"
    """State of what is frozen: freed, kept, or moved to the host."""
    turn_warmup: int = 0
    """Steps over which the learning rate of what a mask brings in rises, each time anew, and at the start (ours):
    moments that start anew make the first steps of a turn its worst ones."""
    mask_warmup: str = "0step"
    """How long everything trains before the first mask; memory is full until then."""

    @property
    def trains(self) -> str:
        return f"over-{self.optimizer}"

    recipe = "omgd"
    align = True
    also: ClassVar = {"over": "optimizer"}

    def groups(self, params: Params) -> list[Group]:
        """Who trains what, masks aside: as the recipe of each rule has it, which for SNSM includes the head."""
        return snsm.groups(self, self.rule(), params) if isinstance(self.options, Snsm) else super().groups(params)

    def optimizer_for(self, setup: Setup) -> Optimizer:
        """The masked optimizer."""
        made = schedule(self, setup.params, setup.epoch, setup.key)
        mode = self.scale_mode or ("none" if self.replacement or isinstance(made, NormMasks) else "grad")
        return omgd(super().optimizer_for(setup), setup.params, made, mode, self.state_policy, self.turn_warmup)

    def notes(self, setup: Setup, optimizer: Optimizer) -> list[str]:
        """What the schedule means for this run."""
        made = schedule(self, setup.params, setup.epoch, setup.key)
        now = describe(optimizer.metadata, setup.params, made.warmup, optimizer.init(setup.params, made.warmup))
        if isinstance(made, NormMasks):
            masks = f"{made.each} at a time by their gradient norms, each choice"
        else:
            masks = "a mask drawn anew each time" if made.replacement else f"{made.masks} masks a cycle, each"
        said = [
            *super().notes(setup, optimizer),
            f"{len(made.groups.labels)} {made.groups.kind} to choose from, {masks} held for {made.period:,} steps; "
            f"{now['trainable']:.0%} of all parameters train under the first",
        ]
        if isinstance(made, NormMasks):
            return said
        if lost := gives_up(made, setup.epoch):
            said.append(f"warning: {lost}")
        if not made.replacement and (left := (self.steps - made.warmup) % made.length):
            said.append(
                f"warning: the run ends {left:,} steps into a cycle of {made.length:,}: not everything trains equally "
                "long"
            )
        return said

    def check(self) -> None:
        super().check()
        self.at_least("turn_warmup", 0)
        if self.choose == "norms":
            cycles = {"order": "epochwise", "remainder": "short", "reshuffle": True, "replacement": False}
            for name, value in {"by": "layers", **cycles}.items():
                if (got := getattr(self, name)) != value:
                    raise UsageError(
                        f"--choose norms: got --{name} {got}, expected {value}: layers are drawn by their norms, and "
                        "there is no cycle"
                    )


@dataclass(frozen=True, kw_only=True)
class Glue(GlueConfig, Pretrain):
    recipe = "omgd-glue"

    @classmethod
    def published(cls, task: str) -> Mapping[str, Any]:
        """arXiv 2603.05960. Table 7: learning rates, batches, 30 epochs, rows of 512. Its code: 4 of 12 layers, 2
        epochs a mask (as Table 6 confirms), AdamW without decay, no warm-up, a linear decay to 0, no clipping, seed
        42."""
        own = of_table(task, OMGD_RATES, OMGD_BATCHES, "arXiv 2603.05960, Table 7,")
        return {**own, "active": 4, "period": "2epoch", "seed": 42}


@dataclass(frozen=True, kw_only=True)
class Gpt2(gpt2.Gpt2Train, Pretrain):
    recipe = "omgd-gpt2"


@dataclass(frozen=True, kw_only=True)
class Resnet(ResnetConfig, Pretrain):
    recipe = "omgd-resnet"

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """arXiv 2603.05960, section 5.2 and Table 4: half of the tensors, an epoch each, Nesterov momentum of 0.9, lr
        0.1, 200 epochs of batches of 256 (ImageNet, ResNet-18: 100 of 512). Its code: 10 epochs before the first mask,
        state kept, rates that fall at 1/2 and 3/4 (CIFAR-100 at 60, 120, 150, to a fifth; ImageNet at 30, 60, 90), the
        seeds."""
        momentum = RULES["sgd"].default(momentum=0.9, nesterov=True)
        masks = {"by": "tensors", "keep": 0.5, "period": "1epoch", "mask_warmup": "10epoch", "state_policy": "keep"}
        return {**vision.RESNETS[preset], **masks, "options": momentum}


@dataclass(frozen=True, kw_only=True)
class Vit(VitConfig, Pretrain):
    recipe = "omgd-vit"

    @classmethod
    def published(cls, preset: str) -> Mapping[str, Any]:
        """arXiv 2603.05960, Table 5: 3 of 12 layers, 5 epochs each (ImageNet: 4, an epoch each), AdamW at 1e-4, decay
        1e-4, batches of 512, times 0.95 every 2 epochs, of vit-base-patch16-224-in21k (--init)."""
        masks = (4, "1epoch") if preset == "imagenet" else (3, "5epoch")
        return {**vision.vits(preset), **dict(zip(("active", "period"), masks, strict=True))}


def schedule(config: Pretrain, params: Params, epoch: int, key: Key) -> Choice:
    """The masks that the flags ask for, `epoch` steps being a pass over the data."""
    if config.choose == "norms":
        return norm_masks(
            config.layers(params),
            key,
            active=config.active,
            period=duration(config.period, epoch),
            mask_warmup=duration(config.mask_warmup, epoch),
        )
    if config.by == "layers":
        chosen = config.layers(params)
    elif config.by == "tensors":
        chosen = tensors(trainable(params), config.match or ("",), config.balance)
    else:
        chosen = coordinates(trainable(params), config.match or (config.matrices,))
    return traversal(
        chosen,
        key,
        active=config.active if config.by == "layers" else None,
        keep=None if config.by == "layers" else config.keep,
        period=duration(config.period, epoch),
        order=config.order,
        remainder=config.remainder,
        reshuffle=config.reshuffle,
        replacement=config.replacement,
        mask_warmup=duration(config.mask_warmup, epoch),
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Weights, gradients and optimizer state of training a LLaMA, from its shapes alone."""

    model: Literal["demo", "60m", "130m", "350m", "1b", "7b"] = "7b"
    """Size of the LLaMA."""
    active: tuple[int, ...] = (1, 2, 4, 8)
    """Layers that train at a time, a row each."""
    rank: int = 128
    """Of GaLore's subspaces."""


class Held(NamedTuple):
    """Bytes that training holds besides activations."""

    weights: int
    gradients: int
    moments: int
    segment: int  # the largest gradients of one segment
    state: int  # of this engine: moments in float32, bases and clocks too


def held(optimizer: Optimizer, params: Params) -> Held:
    """Weights, gradients and moments in bfloat16, as the paper counts; and what this engine holds."""
    state: State = optimizer.init(params)
    trainable, _ = optimizer.split(params, state)
    blocks: dict[str, int] = {}
    for name, p in trainable.items():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else name
        blocks[block] = blocks.get(block, 0) + 2 * p.numel()
    moments = sum(t.numel() for slots in state.values() for slot, t in slots.items() if slot.startswith("exp_avg"))
    return Held(
        2 * sum(p.numel() for p in params.values()),
        sum(blocks.values()),
        2 * moments,
        max(blocks.values()),
        sum(map(state_bytes, state.values())),
    )


def memory(config: Memory) -> dict[str, Held]:
    """What each way of training holds, by name."""
    with torch.device("meta"):
        model = Llama(PRESETS[config.model])
    params: Params = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    everything = partition(params, [Group("adamw", adamw(), ("",), 0.0)])
    low_rank = [Group("galore", galore(config.rank), (MATRICES,), 0.0), Group("adamw", adamw(), ("",), 0.0)]
    rows = {
        "AdamW": held(everything, params),
        f"GaLore, rank {config.rank}": held(partition(params, low_rank), params),
    }
    for active in config.active:
        masks = traversal(layers(params), Key(0), active=active, period=1)
        rows[f"OMGD, {active} of {len(masks.groups.labels)} layers"] = held(omgd(everything, params, masks), params)
    return rows


def show_memory(config: Memory) -> None:
    """Print the table."""
    table = Table(title=f"LLaMA-{config.model}, GiB, without activations", title_justify="left")
    table.add_column("")
    for column in ("weights", "all gradients", "moments, bf16", "sum"):
        table.add_column(column, justify="right")
    for column in ("a segment's gradients", "state, fp32", "sum"):
        table.add_column(column, justify="right", style="cyan")
    for name, (weights, gradients, moments, segment, state) in memory(config).items():
        theirs, ours = (weights, gradients, moments), (segment, state)
        figures = [*theirs, sum(theirs), *ours, weights + sum(ours)]
        table.add_row(name, *(f"{figure / GIB:.2f}" for figure in figures))
    watched = sys.stdout.isatty()
    console = Console(soft_wrap=not watched, width=None if watched else 120, markup=False, emoji=False, highlight=False)
    console.print(table)
    console.print(
        "The first four as the paper counts: bfloat16, gradients of all that trains, GaLore without its bases. The "
        "last\nthree as this engine holds it: weights in bfloat16, gradients of one segment, moments, bases and clocks "
        "in float32."
    )


COMMANDS: dict[str, tuple[str, Any]] = {
    "toy": (Toy.__doc__ or "", Toy()),
    "pretrain": ("Train a LLaMA with masks over any rule.", Pretrain()),
    "glue": (
        "Fine-tune a BERT or RoBERTa on a task of GLUE, 2 layers at a time, an epoch each; lr ours, not tuned.",
        Glue(**HERE, lr=1e-4, period="1epoch"),
    ),
    "gpt2": (
        "Train a GPT-2 of 11 M parameters, 3 of 6 layers at a time; settings ours, lr not tuned: see recipes/gpt2.py.",
        Gpt2(**gpt2.HERE, active=3, mask_warmup="4step"),
    ),
    "gpt2-paper": (
        "The paper's GPT-2 (section 5.4): 124 M parameters, 3 of 12 layers at a time; see recipes/gpt2.py.",
        Gpt2(**gpt2.PAPER, active=3, mask_warmup="1000step"),
    ),
    "resnet": (
        "Train a ResNet on images, half of its tensors an epoch each; lr and schedule ours, not tuned.",
        Resnet(**vision.SMALL_RESNET, by="tensors", period="1epoch", state_policy="keep"),
    ),
    "vit": (
        "Train a ViT on images, 2 layers at a time, an epoch each; lr ours, not tuned.",
        Vit(**vision.SMALL_VIT, period="1epoch"),
    ),
    "memory": ("Weights, gradients and optimizer state of training a LLaMA, from its shapes alone.", Memory()),
}


def run(config: Toy | Pretrain | Memory) -> None:
    """One subcommand."""
    if isinstance(config, Toy):
        toy(config)
    elif isinstance(config, Memory):
        show_memory(config)
    else:
        train(config)


def parse(args: Sequence[str] | None = None, program: str = "") -> Toy | Pretrain | Memory:
    """The config that a command line of `program` asks for. Raises UsageError."""
    found: Toy | Pretrain | Memory = flags.parse_presets(commands(COMMANDS, args), args, program, __doc__)
    return found


if __name__ == "__main__":
    main(parse, run)
