"""Labelled texts as what a run is trained on: read, encoded with the model's own tokenizer, and said in a few words."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from engine.data import glue as reading
from engine.data.pairs import Encoded, PairTokenizer
from engine.data.tokenizer import KEPT
from engine.loop.metrics import Metrics
from engine.loop.trainer import Trainer
from engine.tasks.scores import scores
from engine.tasks.sequences import ClassificationTask, RegressionTask, RowTask
from optimizers.contract import UsageError

from .build import Run
from .glue import GlueConfig
from .material import Material


class Labelled(Material):
    """The examples of a task, with the labels that they have."""

    def __init__(self, config: GlueConfig, console: Console) -> None:
        """Raises UsageError."""
        assert config.init is not None
        self.vocabulary = config.vocabulary()
        self.pairs = PairTokenizer.of_model(config.init, self.vocabulary)
        layout = config.layout
        if not config.data:
            raise UsageError(f"--data: got none; give the folder of {layout.folder or 'the data'}, or files")
        train = reading.files(config.data, layout, True)
        held_out = self._held_out(config, layout)
        if not (layout.labels or config.regression):
            layout = layout._replace(labels=reading.names_of(train, layout.columns[0]))
            if len(layout.labels) < 2:
                raise UsageError(
                    f"{train[0]}: got the labels {layout.labels}, expected two or more; name --label-field"
                )
        self.config: GlueConfig = config if config.regression else dataclasses.replace(config, labels=layout.labels)
        self.layout = layout
        self.train, self.held_out = (self._encoded(files, config) for files in (train, held_out))
        self.rows = len(self.train)

    def _held_out(self, config: GlueConfig, layout: reading.Layout) -> list[Path]:
        if config.validation:
            return reading.files(config.validation, layout, False)
        found = reading.files(config.data, layout, False)
        if all(Path(path).is_file() for path in config.data):
            raise UsageError("--validation: got none; --data names files, so name the held-out ones too")
        return found

    def _encoded(self, files: Sequence[Path], config: GlueConfig) -> Encoded:
        found = reading.read(files, self.layout, config.allow_malformed)
        kind: Any = np.float32 if config.regression else np.int64
        return self.pairs.encode(found.texts, np.array(found.targets, kind), config.sequence)

    def task(self, run: Run) -> RowTask:
        config = run.config
        assert isinstance(config, GlueConfig)
        kind = RegressionTask if config.regression else ClassificationTask
        return kind(
            run.model,
            self.train,
            self.held_out,
            config.sequence,
            scores=scores(self.layout.scores, len(self.layout.labels) or None),
            config=run.model.config.to_hf(),
            pad=run.model.config.pad_token_id,
            seed=config.seed,
            align=config.micro_batch * config.accumulation,
            most=config.eval_rows or None,
        )

    def in_words(self, run: Run, task: RowTask) -> list[str]:
        config, size = run.config, run.config.micro_batch * run.config.accumulation
        labels = ", ".join(self.layout.labels) or "a number"
        read = min(task.most or len(self.held_out), len(self.held_out))
        return [
            f"{self.rows:,} training rows of at most {config.sequence} tokens ({self.train.cut:,} cut, the mean is "
            f"{len(self.train.ids) / self.rows:.0f}), {len(self.held_out):,} held out; label: {labels}",
            f"a step takes {size:,} rows; the run is {config.steps:,} steps, {config.steps * size / task.rows:.2f} "
            f"epochs; an evaluation, every {config.eval_every:,} steps, reads {read:,} rows",
        ]

    def more(self, out: Path) -> list[str | Path]:
        return []

    def show(self, task: RowTask, console: Console) -> None:
        """Labelled texts are what they look like."""

    def watch(self, run: Run, task: RowTask, trainer: Trainer) -> None:
        """Its evaluation is the task's."""

    def keep(self, out: Path) -> None:
        (out / KEPT).mkdir(exist_ok=True)
        self.pairs.copy_to(out / KEPT)

    def told(self, metrics: Metrics) -> str:
        said = []
        for name in self.layout.scores:
            found = [(int(r["step"]), r[f"eval/{name}"]) for r in metrics.history if f"eval/{name}" in r]
            if found:
                best = max(found, key=lambda pair: (pair[1] == pair[1], pair[1]))
                said.append(f"{name} {found[0][1]:.4f} -> {found[-1][1]:.4f}, best {best[1]:.4f} at step {best[0]}")
        return "; ".join(said)
