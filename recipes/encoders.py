"""What a recipe is told that trains a published encoder, a BERT or RoBERTa, whatever its head."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro

from models import encoder_weights, weights
from models.encoder import Encoder
from models.encoder_config import EncoderConfig
from optimizers.contract import Optimizer, Params, UsageError

from .config import Setup, Size, TrainConfig
from .epochs import EpochConfig
from .errors import usage

MATRICES = r"\blayer\.\d+\..*(query|key|value|dense)\.weight$"  # attention and MLP of an encoder's layers
VECTORS = r"LayerNorm|layer_norm|bias$"
BLOCKS = r"\bencoder\.layer\.(\d+)\."


@dataclass(frozen=True, kw_only=True)
class EncoderTrain(EpochConfig):
    """Flags of every recipe that trains an encoder. A class below it says the shape, with its head (`encoder`)."""

    init: Path | None = None
    """A folder with a BERT or RoBERTa as Hugging Face publishes it, whose weights and tokenizer the run begins with."""
    new_head: bool = False
    """Draw the head anew, although the folder has one."""
    epochs: float = 3.0
    """Passes over the data, in the place of --steps; an epoch is filled up to whole steps."""
    eval_epochs: float = 1.0
    """Passes between evaluations, in the place of --eval-every."""
    eval_rows: int = 0
    """Held-out rows per evaluation, evenly spaced; 0: all."""
    sequence: int = 128
    """Tokens per row: longer texts are cut, shorter ones filled up."""
    micro_batch: int = 16
    """Rows that go through the model at once."""

    model: tyro.conf.Suppress[Literal["demo", "60m", "130m", "350m", "1b", "7b"]] = "demo"
    size: tyro.conf.Suppress[Size] = dataclasses.field(default_factory=Size)
    prompt: tyro.conf.Suppress[str] = ""
    tokenizer: tyro.conf.Suppress[str] = "byte"
    eos: tyro.conf.Suppress[str | None] = None
    allow_unknown: tyro.conf.Suppress[float] = 0.01
    documents: tyro.conf.Suppress[Literal["joined", "apart"]] = "joined"
    eval_windows: tyro.conf.Suppress[int] = 64

    matrices = MATRICES
    vectors = VECTORS
    blocks = BLOCKS
    align = True
    about: ClassVar = (*TrainConfig.about, "new_head", "epochs", "eval_epochs", "eval_rows")
    usual: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"rank": 4, "update_proj_gap": 50, "proj_type": "auto"},
        "sgd": {"momentum": 0.9},
    }

    def encoder(self) -> EncoderConfig:
        """The model's shape. Raises UsageError where the labels are not known before the data are read."""
        raise NotImplementedError

    @property
    def known(self) -> bool:
        """Is the head known before the data are read?"""
        return True

    def check(self) -> None:
        if self.init is None:
            raise UsageError("--init: got none; give the folder of a BERT or RoBERTa as Hugging Face publishes it")
        super().check()
        self.at_least("eval_rows", 0)

    def check_init(self, plan: bool = False) -> None:
        if self.init is None or not (plan or self.resume == "never"):
            return
        with usage("--init"):
            body = encoder_weights.config_of(self.init, "masked")
            if self.sequence > body.longest:
                raise UsageError(
                    f"--sequence: got {self.sequence}, expected at most {body.longest}, the positions of the model in "
                    f"{self.init}"
                )
            if self.resume != "never" or (plan and not weights.is_folder(self.init)):
                return
            model = encoder_weights.empty(self.encoder() if self.known else body)
            encoder_weights.sources(model, self.init, self.new_head or not self.known)

    def vocabulary(self) -> int:
        assert self.init is not None
        with usage("--init"):
            return encoder_weights.config_of(self.init).vocab_size

    def network(self, vocabulary: int) -> Encoder:
        return Encoder(self.encoder())

    def fill(self, model: Encoder, params: Params) -> None:
        assert self.init is not None
        with usage("--init"):
            found = encoder_weights.sources(model, self.init, self.new_head)
            encoder_weights.fill(params, model, found, self.seed)

    def notes(self, setup: Setup, optimizer: Optimizer) -> list[str]:
        said = super().notes(setup, optimizer)
        if self.init is None or self.resume != "never" or not weights.is_folder(self.init):
            return said
        found = encoder_weights.sources(setup.model, self.init, self.new_head)
        if found.drawn:
            said.append(f"drawn anew, as {self.init} does not have them: {', '.join(found.drawn)}")
        if found.unused:
            said.append(f"of {self.init} not used: {', '.join(found.unused)}")
        return said
