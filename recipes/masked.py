"""A masked language model (BERT, arXiv 1810.04805): an encoder says the tokens of a text that were hidden from it.

    python -m recipes.baseline masked --init MODEL --data corpus/*.txt

The text is read as every other recipe reads it, and becomes rows of --sequence tokens with the model's own tokenizer:
a document is cut into as many as it needs, and none holds two. All tokens lie in memory. Of each row --hidden of the
tokens are to be said, others in every epoch. The settings are ours, for MiniLM on two cores, none of them tuned: 300
steps, unless --epochs says how long.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from engine.data.pairs import PairTokenizer
from engine.data.request import Job, Request
from engine.data.split import SIDES, Side
from engine.data.tokenizer import KEPT
from engine.loop.metrics import Metrics
from engine.loop.trainer import Trainer
from engine.step.segments import Batch
from engine.tasks.masked import MaskedTask, blank
from engine.terminal.progress import Bar
from models import encoder_weights
from models.encoder_config import EncoderConfig
from optimizers.contract import UsageError

from .build import Run
from .encoders import EncoderTrain
from .errors import usage
from .material import CACHE, Material


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(EncoderTrain):
    """Flags of every recipe that trains a masked language model."""

    hidden: float = 0.15
    """The share of a row's tokens that are to be said: of these 80 % are hidden, 10 % replaced by others, 10 % left."""
    epochs: float = 0.0
    """Passes over the data, in the place of --steps; an epoch is filled up to whole steps. 0: --steps count."""
    eval_epochs: float = 0.0
    """Passes between evaluations, in the place of --eval-every. 0: --eval-every counts."""
    eval_every: int = 50
    """Steps between evaluations on held-out text; one more follows the last step."""
    eval_rows: int = 256
    """Held-out rows per evaluation, evenly spaced; 0: all."""

    about: ClassVar = (*EncoderTrain.about, "hidden")

    def check(self) -> None:
        super().check()
        if not 0 < self.hidden < 1:
            raise UsageError(f"--hidden: got {self.hidden}, expected a share of the tokens, between 0 and 1")

    def encoder(self) -> EncoderConfig:
        assert self.init is not None
        with usage("--init"):
            return encoder_weights.config_of(self.init, "masked")

    def blank(self, rows: int) -> Batch:
        return blank(rows, self.sequence, self.hidden)


class Hidden(Material):
    """Plain text in rows of an encoder's tokens, some of which will be hidden."""

    def __init__(self, config: MaskedConfig, console: Console) -> None:
        """Raises UsageError."""
        assert config.init is not None
        self.config = config
        self.vocabulary = config.vocabulary()
        self.pairs = PairTokenizer.of_model(config.init, self.vocabulary)
        self.mask = self.pairs.mask
        bar = Bar(console)
        with bar.progress:
            texts = _texts(config, bar)
        self.train, self.held_out = (self.pairs.pieces(texts[side], config.sequence) for side in SIDES)
        for side, rows in zip(SIDES, (self.train, self.held_out), strict=True):
            if not len(rows):
                raise UsageError(f"--data: got no text for {side}, expected documents on both sides; give more text")
        self.rows = len(self.train)

    def task(self, run: Run) -> MaskedTask:
        config = run.config
        assert isinstance(config, MaskedConfig)
        return MaskedTask(
            run.model,
            self.train,
            self.held_out,
            config.sequence,
            mask=self.mask,
            config=run.model.config.to_hf(),
            seed=config.seed,
            align=config.micro_batch * config.accumulation,
            most=config.eval_rows or None,
            share=config.hidden,
        )

    def in_words(self, run: Run, task: MaskedTask) -> list[str]:
        config, size = run.config, run.config.micro_batch * run.config.accumulation
        return [
            f"{self.rows:,} training rows of at most {config.sequence} tokens (the mean is "
            f"{len(self.train.ids) / self.rows:.0f}), {len(self.held_out):,} held out; {task.share:.0%} of the tokens "
            "are hidden",
            f"a step takes {size:,} rows; the run is {config.steps:,} steps, {config.steps * size / task.rows:.2f} "
            f"epochs; an evaluation, every {config.eval_every:,} steps, reads "
            f"{min(task.most or len(self.held_out), len(self.held_out)):,} rows",
        ]

    def more(self, out: Path) -> list[str | Path]:
        return []

    def show(self, task: MaskedTask, console: Console) -> None:
        """Text is what it looks like."""

    def watch(self, run: Run, task: MaskedTask, trainer: Trainer) -> None:
        """Its evaluation is the task's."""

    def keep(self, out: Path) -> None:
        (out / KEPT).mkdir(exist_ok=True)
        self.pairs.copy_to(out / KEPT)

    def told(self, metrics: Metrics) -> str:
        found = [(int(r["step"]), r["eval/accuracy"]) for r in metrics.history if "eval/accuracy" in r]
        return f"hidden tokens foreseen {found[0][1]:.1%} -> {found[-1][1]:.1%}" if found else ""


def _texts(config: MaskedConfig, bar: Bar) -> dict[Side, list[str]]:
    """The documents of both sides, divided as `tools.prepare` divides them. Raises UsageError."""
    request = Request(config.data, config.validation, field=config.field, allow_malformed=config.allow_malformed)
    job = Job(request, CACHE)
    split, _ = job.survey(bar)
    texts: dict[Side, list[str]] = {side: [] for side in SIDES}
    for batch in job.batches():
        for file, _, text in batch:
            for side, part in split.parts(text):
                if part and (side == "train" or not job.given or file < len(job.given)):
                    texts[side].append(part)
    return texts
