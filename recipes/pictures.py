"""Images as what a run is trained on: read, checked against the flags, and said in a few words."""

import dataclasses
from pathlib import Path

from rich.console import Console

from engine.data.images.read import read
from engine.data.images.sets import said
from engine.loop.metrics import Metrics
from engine.loop.trainer import Trainer
from engine.tasks.images import ImageTask
from engine.tasks.scores import scores
from optimizers.contract import UsageError

from .build import Run
from .material import Material
from .vision import VisionConfig


class Pictures(Material):
    """A set of labelled images, and the model that it asks for."""

    def __init__(self, config: VisionConfig, console: Console) -> None:
        """Raises UsageError."""
        if not config.data:
            raise UsageError("--data: got none; give the folder of the images, as --help lists the forms")
        self.split = read(Path(config.data[0]), config.resize)
        channels, rows, columns = self.split.train.shape
        for flag, asked, got in (
            ("--num-classes", config.num_classes, len(self.split.classes)),
            ("--channels", config.channels, channels),
        ):
            if asked not in (0, got):
                raise UsageError(
                    f"{flag}: got {asked}, and {config.data[0]} has {got}; leave it out, or give other data"
                )
        if rows != columns and not config.image_size:
            raise UsageError(
                f"{config.data[0]}: got {said(self.split.train.shape)}, expected squares; give --image-size or --resize"
            )
        if config.train_images > len(self.split.train.targets):
            raise UsageError(
                f"--train-images: got {config.train_images:,}, and {config.data[0]} has "
                f"{len(self.split.train.targets):,}; leave it out for all"
            )
        found = (channels, min(rows, columns))
        self.config: VisionConfig = dataclasses.replace(config, labels=self.split.classes, found=found)
        self.config.check()
        self.vocabulary = len(self.split.classes)
        self.rows = config.train_images or len(self.split.train.targets)

    def task(self, run: Run) -> ImageTask:
        config = run.config
        assert isinstance(config, VisionConfig)
        return ImageTask(
            run.model,
            self.split.train,
            self.split.held_out,
            config.side,
            scores=scores(("accuracy",), len(self.split.classes)),
            config=run.model.config.to_hf(),
            augment=config.augment,
            padding=config.padding,
            norm=config.norm,
            seed=config.seed,
            align=config.micro_batch * config.accumulation,
            most=config.eval_images or None,
            first=config.train_images or None,
        )

    def in_words(self, run: Run, task: ImageTask) -> list[str]:
        config, size = run.config, run.config.micro_batch * run.config.accumulation
        held_out = len(self.split.held_out.targets)
        seen = "" if task.side == self.split.train.shape[1] else f", resized to {task.side} x {task.side}"
        return [
            f"{self.rows:,} training images, {held_out:,} held out, of {self.vocabulary} classes, "
            f"{said(self.split.train.shape)}{seen}",
            f"a step takes {size:,} images; the run is {config.steps:,} steps, {config.steps * size / task.rows:.2f} "
            f"epochs; an evaluation, every {config.eval_every:,} steps, reads {min(task.most or held_out, held_out):,}",
        ]

    def more(self, out: Path) -> list[str | Path]:
        return []

    def show(self, task: ImageTask, console: Console) -> None:
        """A terminal shows no images."""

    def watch(self, run: Run, task: ImageTask, trainer: Trainer) -> None:
        """Its evaluation is the task's."""

    def keep(self, out: Path) -> None:
        """The classes' names are in the checkpoint's config.json."""

    def told(self, metrics: Metrics) -> str:
        found = [(int(r["step"]), r["eval/accuracy"]) for r in metrics.history if "eval/accuracy" in r]
        if not found:
            return ""
        best = max(found, key=lambda pair: pair[1])
        return f"accuracy {found[0][1]:.1%} -> {found[-1][1]:.1%}, best {best[1]:.1%} at step {best[0]}"
