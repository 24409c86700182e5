"""What a recipe is told that fine-tunes an encoder on a task of GLUE (arXiv 1804.07461), or on labelled texts like it.

The model is a BERT or RoBERTa folder as Hugging Face publishes it (--init), the data GLUE's own tsv folders, files of
Hugging Face's `glue`, or any jsonl, csv, tsv or parquet with columns that are named.

`--preset paper` takes a paper's settings for RoBERTa-base on the task that --task names; each recipe says where its own
come from. Without it, the settings are ours, for MiniLM on two cores: 3 epochs, rows of 128 tokens, batches of 16, a
linear decay to 0 after a tenth of the steps, dropout as in the model's config.json.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

from engine.data.glue import GLUE, Columns, Layout
from engine.step.segments import Batch
from engine.tasks import sequences
from engine.tasks.scores import CLASSES, NUMBERS, scores
from models import encoder_weights, weights
from models.encoder import Encoder
from models.encoder_config import EncoderConfig
from optimizers.contract import Optimizer, Params, UsageError

from .config import Setup, Size, TrainConfig
from .epochs import EpochConfig
from .errors import usage

Name = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli", "custom"]
MATRICES = r"\blayer\.\d+\..*(query|key|value|dense)\.weight$"  # attention and MLP of an encoder's layers
VECTORS = r"LayerNorm|layer_norm|bias$"
BLOCKS = r"\bencoder\.layer\.(\d+)\."
TASKS = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")  # of the papers' tables, in their order


@dataclass(frozen=True, kw_only=True)
class GlueConfig(EpochConfig):
    """Flags of every recipe that fine-tunes an encoder on labelled texts."""

    init: Path | None = None
    """A folder with a BERT or RoBERTa as Hugging Face publishes it, whose weights and tokenizer the run begins with."""
    preset: Literal["here", "paper"] = "here"
    """Settings under the flags that are given: ours, for a small model on two cores; the paper's, for RoBERTa-base."""
    task: Name = "rte"
    """The task, which says columns, labels and metrics; custom: as --text-fields, --label-field and --labels say."""
    data: tuple[str, ...] = ()
    """A folder with the splits of the task, such as GLUE's download or its RTE/ (train.tsv, dev.tsv), or one of Hugging
    Face's parquet, jsonl or csv files (train-*, validation-*); or files to train on, with --validation."""
    validation: tuple[str, ...] = ()
    """Held-out files; by default the folder's dev or validation split."""
    text_fields: tuple[str, ...] = ()
    """The column of the text, or the two of a pair, where they are not the task's."""
    label_field: str = ""
    """The column of the label, where it is not the task's."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of their numbers; by default the task's, or those of a custom one's file, sorted."""
    numbers: bool = False
    """A custom task's labels are numbers to come close to, not classes."""
    metrics: tuple[str, ...] = ()
    """What evaluations report beside the loss: accuracy, f1, matthews of classes, pearson, spearman of numbers."""
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
    field: tyro.conf.Suppress[str] = "text"
    tokenizer: tyro.conf.Suppress[str] = "byte"
    eos: tyro.conf.Suppress[str | None] = None
    allow_unknown: tyro.conf.Suppress[float] = 0.01
    documents: tyro.conf.Suppress[Literal["joined", "apart"]] = "joined"
    eval_windows: tyro.conf.Suppress[int] = 64

    matrices = MATRICES
    vectors = VECTORS
    blocks = BLOCKS
    align = True
    about: ClassVar = (
        *TrainConfig.about,
        *("preset", "task", "text_fields", "label_field", "labels", "numbers", "metrics", "new_head"),
        *("epochs", "eval_epochs", "eval_rows"),
    )
    usual: ClassVar = {
        "": {"rank": 4, "update_proj_gap": 50, "proj_type": "auto"},
        "sgd": {"momentum": 0.9},
    }

    @classmethod
    def published(cls, task: str) -> Mapping[str, Any]:
        """Fields as a paper has them for this task. Raises UsageError where it says nothing of it."""
        raise UsageError(f"--preset paper: this recipe has no published settings for {task}; leave it out")

    def asked_of_paper(self, given: Mapping[str, str]) -> Mapping[str, Any]:
        return self.published(given.get("--task", self.task)) if given.get("--preset") == "paper" else {}

    @property
    def named(self) -> str:
        return f"{self.task}-{super().named}"

    @property
    def layout(self) -> Layout:
        """Where texts and labels stand, with what the flags change."""
        own = GLUE.get(self.task) or Layout("", (), (), ("pearson", "spearman") if self.numbers else ("accuracy",))
        columns = own.columns
        if self.text_fields or self.label_field:
            texts = self.text_fields or columns[0].texts
            columns = (Columns(texts, self.label_field or (columns[0].label if columns else "label")),)
        return own._replace(columns=columns, labels=self.labels or own.labels, scores=self.metrics or own.scores)

    @property
    def regression(self) -> bool:
        return self.numbers or self.task == "stsb"

    def encoder(self) -> EncoderConfig:
        """The model's shape. Raises UsageError where the labels are not known before the data are read."""
        labels = self.layout.labels
        if not (labels or self.regression):
            raise UsageError("--labels: got none; name the labels of the custom task, in the order of their numbers")
        assert self.init is not None
        with usage("--init"):
            if self.regression:
                return encoder_weights.config_of(self.init, "regression")
            return encoder_weights.config_of(self.init, "classification", labels)

    def check(self) -> None:
        if self.init is None:
            raise UsageError("--init: got none; give the folder of a BERT or RoBERTa as Hugging Face publishes it")
        super().check()
        custom = self.task == "custom"
        if custom and not self.text_fields:
            raise UsageError("--text-fields: got none; name the column of the text of a custom task, or two of a pair")
        if len(self.text_fields) > 2:
            raise UsageError(f"--text-fields: got {len(self.text_fields)}, expected one, or two of a pair")
        if self.numbers and not custom:
            raise UsageError(f"--numbers: {self.task} says what its labels are; leave it out, or give --task custom")
        if self.labels and (self.regression or len(self.labels) < 2):
            raise UsageError(f"--labels: got {', '.join(self.labels)}, expected two or more, of a task of classes")
        known = NUMBERS if self.regression else CLASSES
        if odd := [name for name in self.metrics if name not in known]:
            raise UsageError(f"--metrics: got {odd[0]!r}, expected some of {', '.join(known)} for --task {self.task}")
        scores(self.layout.scores, None if self.regression else max(len(self.layout.labels), 2))
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
            known = bool(self.layout.labels) or self.regression
            model = encoder_weights.empty(self.encoder() if known else body)
            encoder_weights.sources(model, self.init, self.new_head or not known)

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

    def blank(self, rows: int) -> Batch:
        return sequences.blank(rows, self.sequence, torch.float32 if self.regression else torch.int64)

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


# Settings that several papers share, of RoBERTa-base.
PROTOCOL: Mapping[str, Any] = {
    "epochs": 30.0,
    "sequence": 512,
    "schedule": "linear",
    "floor": 0.0,
    "warmup": 0,
    "weight_decay": 0.0,
}
OMGD_RATES = {"cola": 2.5, "stsb": 2.0, "mrpc": 3.5, "rte": 1.0, "sst2": 1.0, "mnli": 1.0, "qnli": 1.0, "qqp": 1.0}
OMGD_BATCHES = {"cola": 32, "rte": 32, "qqp": 64}  # 16 else
HERE: Mapping[str, Any] = {"schedule": "linear", "floor": 0.0}  # ours


def of_table(task: str, rates: Mapping[str, float], batches: Mapping[str, int], source: str) -> dict[str, Any]:
    """PROTOCOL with a task's rate, in units of 1e-5, and batch. Raises UsageError where the table lacks the task."""
    task = "mnli" if task == "mnli-mm" else task
    if task not in rates:
        raise UsageError(f"--preset paper: {source} has no task {task}; expected one of {', '.join(TASKS)}")
    return {**PROTOCOL, "preset": "paper", "lr": rates[task] * 1e-5, "micro_batch": batches.get(task, 16)}
