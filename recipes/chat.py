"""What a recipe that trains on conversations is told of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from engine.data.chat.masks import TrainOn
from engine.data.chat.packing import Longer
from engine.step.segments import Batch
from engine.tasks import conversations
from optimizers.contract import UsageError

from .config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TrainConfig):
    epochs: float = 1.0
    """Passes over the data, in the place of --steps; an epoch is filled up to whole steps."""
    train_on: TrainOn = "assistant"
    """What is trained: every answer, the last one alone, or all tokens."""
    prompt_field: str = ""
    """The field that holds the prompt, where it is not "prompt"."""
    completion_field: str = ""
    """The field that holds what to answer, where it is not "completion"."""
    render: Literal["auto", "template", "plain"] = "auto"
    """Put prompt and completion into the model's chat template, or join them as plain texts; auto: the template where
    there is one."""
    joint: str = ""
    """What stands between prompt and completion where they are joined as plain texts."""
    validation_fraction: float | None = None
    """The share of the data, in characters, that is held out where there is no --validation; by default 0.02, and at
    least one example."""
    longer: Longer = "refuse"
    """What becomes of examples that are longer than the sequence."""
    pack: bool = True
    """Several examples a row; else one, and the rest of the row is filled."""
    general: tuple[str, ...] = ()
    """Text as --data takes it elsewhere, which is never trained on: its loss shows what is forgotten."""
    prompts: tuple[str, ...] = ()
    """What the samples after each evaluation answer; by default the prompts of the first held-out examples."""
    samples: int = 2
    """How many of those."""
    sample_tokens: int = 64
    """The most tokens of a sample."""

    about: ClassVar = (
        *TrainConfig.about,
        *("train_on", "prompt_field", "completion_field", "render", "joint", "longer", "pack", "general", "prompts"),
        *("samples", "sample_tokens", "epochs", "validation_fraction"),
    )

    def check(self) -> None:
        super().check()
        self.at_least("samples", 0)
        self.at_least("sample_tokens", 1)
        if self.validation_fraction is not None and self.validation:
            raise UsageError("--validation-fraction: changes nothing beside --validation; leave one of them out")
        if not 0 <= self.epochs < 1e6:
            raise UsageError(f"--epochs: got {self.epochs}, expected a number above 0")

    def settled(self, epoch: int) -> Any:
        """The same, with the steps that --epochs are."""
        return dataclasses.replace(self, steps=max(round(self.epochs * epoch), 1)) if self.epochs else self

    def blank(self, rows: int) -> Batch:
        return conversations.blank(rows, self.sequence)
