"""LoRA (arXiv 2106.09685) by peft, as a baseline beside recipes.finetune: the same model, data, loss and evaluation.

    pip install peft
    python -m recipes.lora MODEL --data chats.jsonl --rank 16 --alpha 32
    python -m recipes.compare OUT --methods "lora @ 2e-4,8e-4 = lora MODEL" \\
        "sumo @ 2e-5,8e-5 = finetune MODEL --optimizer sumo" -- --data chats.jsonl --steps 300

The adapters are peft's: W x + alpha/rank B A x in every matrix of attention and MLP, A drawn uniformly as the weight of
a Linear layer, B zero. AdamW trains them, and all else is frozen. This is a row to compare with and no more: such a run
can be resumed, but its checkpoints are not merged, exported, swapped or sampled from.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import nn

from optimizers.contract import Family, Group, Params, UsageError
from optimizers.random import fold
from optimizers.registry import RULES
from optimizers.storage.stored import BasesDtype

from . import flags, init
from .cli import main
from .finetune import Finetune, read
from .rest import Rest
from .train import train

ADAPTERS = r"\.lora_[AB]\."
BASE = ".base_layer"  # peft puts it between the name of a layer and that of its own weight
TARGETS = r".*layers\.\d+\..*_proj"  # as config.MATRICES, of modules


@dataclass(frozen=True, kw_only=True)
class Lora(Finetune):
    freeze: tyro.conf.Suppress[tuple[str, ...]] = (rf"^(?!.*{ADAPTERS})",)
    preset: tyro.conf.Suppress[Literal["none", "sumo-gsm8k"]] = "none"
    swap: tyro.conf.Suppress[Literal["never", "convert", "only"]] = "never"
    swap_at: tyro.conf.Suppress[tuple[int, str] | None] = None
    rest: tyro.conf.Suppress[Rest] = "adamw"
    rest_lr: tyro.conf.Suppress[float | None] = None
    bases_dtype: tyro.conf.Suppress[BasesDtype] = "fp32"
    stagger: tyro.conf.Suppress[bool] = True
    rank: int = 16
    """Columns of B and rows of A."""
    alpha: float = 32.0
    """The adapters' output is multiplied by alpha / rank."""
    lr: float = 2e-4
    """Peak learning rate; the default is ten times what is usual where all parameters train."""
    lr_of: str = ""

    recipe = "lora"

    @classmethod
    def rules(cls) -> Mapping[str, Family[Any]]:
        return {"adamw": RULES["adamw"]}

    def check(self) -> None:
        self.at_least("rank", 1)
        if not 0 < self.alpha < math.inf:
            raise UsageError(
                f"--alpha: got {self.alpha}, expected a number above 0: what the adapters say is multiplied by it"
            )
        adapters()
        super().check()

    def network(self, vocabulary: int) -> Any:
        model = super().network(vocabulary)
        config, inject = adapters()
        inject(config(r=self.rank, lora_alpha=self.alpha, target_modules=TARGETS), model)
        return model

    def fill(self, model: Any, params: Params) -> None:
        """The published weights, and adapters as the paper begins them: A uniform, B zero (peft's own draws are lost
        where a model is made without memory)."""
        assert self.init is not None
        with torch.device("meta"):
            plain = super().network(model.config.vocab_size)
        init.fill(self.init, plain, {name.replace(BASE, ""): p for name, p in params.items() if "lora_" not in name})
        for name, p in params.items():
            if ".lora_A." in name:
                generator = torch.Generator().manual_seed(fold(self.seed, name) % 2**63)
                nn.init.kaiming_uniform_(p, math.sqrt(5), generator=generator)
            elif ".lora_B." in name:
                nn.init.zeros_(p)

    def groups(self, params: Params) -> list[Group]:
        return [Group("lora", self.rule(), (ADAPTERS,), self.lr, self.weight_decay, "adapters")]


def adapters() -> tuple[Any, Any]:
    """peft's LoraConfig, and what puts adapters into a model. Raises UsageError where peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"recipes.lora needs peft, which cannot be imported ({error}): pip install peft") from None
    return LoraConfig, inject_adapter_in_model


def parse(args: Sequence[str] | None = None, program: str = "") -> Lora:
    """The config that a command line of `program` asks for. Raises UsageError."""
    return read(Lora(), flags.typed(args), program, __doc__)


if __name__ == "__main__":
    main(parse, train)
