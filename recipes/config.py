"""What every training recipe is told: the flags beside those of a run, who trains what, and how that is rebuilt."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from engine.tasks.config import LanguageConfig
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Params, Rule, UsageError
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw

MATRICES = r"layers\.\d+\..*_proj\.weight$"  # attention and MLP; embedding, norms and head go to AdamW


@dataclass(frozen=True)
class Size:
    """Sizes that differ from the preset's."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool | None = None
    """Share one matrix between embedding and head."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LanguageConfig):
    """Flags of every recipe that trains a LLaMA."""

    model: Literal["demo", "60m", "130m", "350m", "1b", "7b"] = "demo"
    """Size of the LLaMA: GaLore's configurations, and a demo of about 3 M parameters."""
    size: Size = field(default_factory=Size)
    """Sizes by hand, over the preset's."""
    lr: float = 1e-3
    """Peak learning rate."""
    rest_lr: float | None = None
    """Peak learning rate of the AdamW that trains embedding, norms and head; by default `lr`."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms are never decayed."""
    stagger: bool = True
    """Rebuild subspace bases a few tensors a step, not all on the same step."""
    prompt: str = "def "
    """What the sample at the end of the run goes on from."""
    dry_run: bool = False
    """Print who trains what, and stop."""
    swap: Literal["never", "convert", "only"] = "never"
    """With --resume: convert the state of the optimizer that the checkpoint was trained with to this one's; "only":
    save that and stop."""
    swap_at: tuple[int, str] | None = None
    """STEP "RECIPE FLAGS": at this step, go on with another optimizer, such as 200 "snsm demo --rank 48"."""

    recipe: ClassVar[str] = ""  # the module in recipes/, and what else tells its runs from others
    align: ClassVar[bool] = False  # epochs are whole steps

    @property
    def trains(self) -> str:
        """What tells this recipe's runs from each other, in folders and pictures."""
        return ""

    def check(self) -> None:
        super().check()
        self.at_least("lr", 0)
        if not self.lr < 3e38:
            raise UsageError(f"--lr must be a float32, got {self.lr}")
        self.at_least("weight_decay", 0)
        if self.swap != "never" and self.resume == "never":
            raise UsageError(f"--swap {self.swap}: there is no state to convert; give --resume a run or a checkpoint")
        if self.swap_at and not 0 < self.swap_at[0] < self.steps:
            raise UsageError(f"--swap-at must name a step from 1 to {self.steps - 1}, got {self.swap_at[0]}")

    def groups(self, params: Params) -> list[Group]:
        """Who trains what."""
        raise NotImplementedError

    def optimizer_for(self, setup: "Setup") -> Optimizer:
        """The optimizer: rules for groups, and what wraps them."""
        return partition(setup.params, self.groups(setup.params), self.stagger)

    def notes(self, setup: "Setup", optimizer: Optimizer) -> list[str]:
        """What a user should know of the optimizer for this run."""
        return []

    def plain(self) -> dict[str, Any]:
        """Every field as JSON can hold it, and the recipe."""
        return {**super().plain(), "recipe": self.recipe}

    def shape(self, vocab_size: int) -> LlamaConfig:
        """The model's configuration. Raises UsageError where sizes do not go together."""
        given = {k: v for k, v in dataclasses.asdict(self.size).items() if v is not None}
        if "num_attention_heads" in given:  # a preset's grouping means nothing for another number of heads
            given.setdefault("num_key_value_heads", None)
        preset = PRESETS[self.model]
        positions = max(preset.max_position_embeddings, self.sequence)
        try:
            return dataclasses.replace(preset, vocab_size=vocab_size, max_position_embeddings=positions, **given)
        except ValueError as error:
            raise UsageError(str(error)) from None


def groups_for(config: TrainConfig, rule: Rule, why: str, matrices: Sequence[str] = (MATRICES,)) -> list[Group]:
    """`rule` on the matrices that match; AdamW on the rest, at a rate of its own where asked."""
    if rule.name == "adamw" and config.rest_lr is None:
        return [
            Group("adamw-norms", rule, ("norm",), config.lr, 0.0, "norms: never decayed"),
            Group("adamw", rule, ("",), config.lr, config.weight_decay, why),
        ]
    return [Group(rule.name, rule, tuple(matrices), config.lr, config.weight_decay, why), *rest_for(config)]


def rest_for(config: TrainConfig) -> list[Group]:
    """AdamW on what is left: norms, embedding and head, at a rate of their own where asked."""
    rest = config.lr if config.rest_lr is None else config.rest_lr
    return [
        Group("adamw-norms", adamw(), ("norm",), rest, 0.0, "norms: vectors, never decayed"),
        Group("adamw-rest", adamw(), ("",), rest, config.weight_decay, "embedding and head: rows, not a map"),
    ]


class Setup(NamedTuple):
    """What an optimizer that wraps another may depend on."""

    model: Llama
    params: Params
    epoch: int  # steps in one pass over the data, the last one filled up
    key: Key
