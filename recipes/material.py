"""What a run is trained on: rows, the task that they make of a model, and what there is to say and to show of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.data import Tokens, tokenizer_of
from engine.data.prepare import cached
from engine.data.prompt import prompt_ids
from engine.data.request import Request
from engine.data.tokenizer import KEPT, Tokenizer
from engine.loop.metrics import Metrics
from engine.loop.trainer import Trainer
from engine.task import Task
from engine.tasks.language import LanguageTask
from engine.terminal.progress import Bar

from . import init
from .build import Run
from .config import TrainConfig

CACHE = Path("runs/.data")


class Material(ABC):
    """Read already, long enough for a sequence."""

    config: TrainConfig
    """With what the data say of the model."""
    tokenizer: Tokenizer
    """Where the model reads text that goes on."""
    vocabulary: int
    """Of the model's tokens."""
    prompt: Sequence[int] = ()
    """What the sample at the end goes on from; empty: no sample is drawn then."""
    rows: int
    """In a pass."""

    @abstractmethod
    def task(self, run: Run) -> Task:
        """Of the run's model, which need not have memory yet. Raises UsageError."""

    @abstractmethod
    def in_words(self, run: Run, task: Any) -> list[str]:
        """What a user should know before the first step, a line each."""

    @abstractmethod
    def more(self, out: Path) -> list[str | Path]:
        """The command that asks the trained model, after "python -m tools.generate"; empty: there is none."""

    @abstractmethod
    def show(self, task: Any, console: Console) -> None:
        """Print an example, where it is not plain text."""

    @abstractmethod
    def watch(self, run: Run, task: Any, trainer: Trainer) -> None:
        """Have the trainer do what belongs to an evaluation here."""

    def keep(self, out: Path) -> None:
        """Put into a run's folder how its tokens are read. Raises WriteError."""
        if not self.tokenizer.files:  # a run can be read wherever it lies
            return
        (out / KEPT).mkdir(exist_ok=True)
        self.tokenizer.copy_to(out / KEPT)
        if self.config.init is not None and self.config.tokenizer == str(self.config.init):
            init.keep_beside(self.config.init, out / KEPT)

    @abstractmethod
    def told(self, metrics: Metrics) -> str:
        """What became of it, "" where the loss says all."""


class Text(Material):
    """Plain text, for a language model."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        """Raises UsageError."""
        bar = Bar(console)
        with bar.progress:
            request = Request(
                config.data,
                config.validation,
                config.tokenizer,
                config.eos,
                config.allow_unknown,
                config.field,
                config.allow_malformed,
            )
            folder = cached(CACHE, request, bar)
        self.config, self.tokens, self.held_out = config, Tokens(folder), Tokens(folder, "validation")
        self.rows, _ = [tokens.windows(config.sequence) for tokens in (self.tokens, self.held_out)]
        self.tokenizer = tokenizer_of(folder)
        self.vocabulary = self.tokenizer.vocab_size
        positions = config.shape(self.tokenizer.vocab_size).max_position_embeddings
        self.prompt, remark = prompt_ids(self.tokenizer, config.prompt, positions)
        if remark:
            console.print(remark)

    def task(self, run: Run) -> LanguageTask:
        config = run.config
        return LanguageTask(
            run.model,
            self.tokens,
            self.held_out,
            config.sequence,
            config=run.model.config.to_hf(),
            seed=config.seed,
            align=config.micro_batch * config.accumulation if config.align else 1,
            eval_windows=config.eval_windows,
            apart=config.documents == "apart",
        )

    def in_words(self, run: Run, task: LanguageTask) -> list[str]:
        config, tokens, tokenizer = run.config, self.tokens, self.tokenizer
        documents = f"{tokens.documents:,} document" + "s" * (tokens.documents != 1)
        size = config.micro_batch * config.accumulation
        return [
            f"{len(tokens):,} training tokens in {documents}, {len(self.held_out):,} held out "
            f"({tokenizer.name}, vocabulary {tokenizer.vocab_size}); a step takes "
            f"{size * config.sequence:,}, the run "
            f"{config.steps * size / task.rows:.2f} epochs; an evaluation reads "
            f"{min(config.eval_windows, task.held_out.windows):,} of {task.held_out.windows:,} held-out sequences, "
            "evenly spaced"
        ]

    def more(self, out: Path) -> list[str | Path]:
        return [out, f"--prompt={self.config.prompt}"]

    def show(self, task: LanguageTask, console: Console) -> None:
        """Text is what it looks like."""

    def watch(self, run: Run, task: LanguageTask, trainer: Trainer) -> None:
        """Its evaluation is the task's."""

    def told(self, metrics: Metrics) -> str:
        return ""
