"""What a recipe is told that fine-tunes an encoder on a task of GLUE (arXiv 1804.07461), or on labelled texts like it.

The model is a BERT or RoBERTa folder as Hugging Face publishes it (--init), the data GLUE's own tsv folders, files of
Hugging Face's `glue`, or any jsonl, csv, tsv or parquet with columns that are named.

`--preset paper` takes a paper's settings for RoBERTa-base on the task that --task names; each recipe says where its own
come from. Without it, the settings are ours, for MiniLM on two cores: 3 epochs, rows of 128 tokens, batches of 16, a
linear decay to 0 after a tenth of the steps, dropout as in the model's config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import tyro

from engine.data.glue import GLUE, Columns, Layout
from engine.step.segments import Batch
from engine.tasks import sequences
from engine.tasks.scores import CLASSES, NUMBERS, scores
from models import encoder_weights
from models.encoder_config import EncoderConfig
from optimizers.contract import UsageError

from .encoders import EncoderTrain
from .errors import usage

Name = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli-mm", "qnli", "rte", "wnli", "custom"]
TASKS = ("cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp")  # of the papers' tables, in their order


@dataclass(frozen=True, kw_only=True)
class GlueConfig(EncoderTrain):
    """Flags of every recipe that fine-tunes an encoder on labelled texts."""

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

    field: tyro.conf.Suppress[str] = "text"

    about: ClassVar = (
        *EncoderTrain.about,
        *("preset", "task", "text_fields", "label_field", "labels", "numbers", "metrics"),
    )

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

    @property
    def known(self) -> bool:
        return bool(self.layout.labels) or self.regression

    def encoder(self) -> EncoderConfig:
        labels = self.layout.labels
        if not (labels or self.regression):
            raise UsageError("--labels: got none; name the labels of the custom task, in the order of their numbers")
        assert self.init is not None
        with usage("--init"):
            if self.regression:
                return encoder_weights.config_of(self.init, "regression")
            return encoder_weights.config_of(self.init, "classification", labels)

    def check(self) -> None:
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

    def blank(self, rows: int) -> Batch:
        return sequences.blank(rows, self.sequence, torch.float32 if self.regression else torch.int64)


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
