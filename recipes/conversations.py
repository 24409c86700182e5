"""Conversations as what a run is trained on: an example shown, general text beside them, samples after evaluations."""

from pathlib import Path

from rich.console import Console

from engine.data import Tokens, tokenizer_of
from engine.data import prepare as texts
from engine.data.chat import prepare as chats
from engine.data.chat.asking import asking
from engine.data.chat.packing import Packed
from engine.data.chat.reader import Examples
from engine.data.chat.request import ChatRequest
from engine.data.chat.show import show, written
from engine.data.chat.template import load_template
from engine.data.request import Request
from engine.loop.metrics import Metrics
from engine.loop.trainer import Trainer
from engine.tasks.finetuning import FinetuneTask
from engine.terminal.progress import Bar
from models.sampling import generate
from optimizers.contract import UsageError

from .build import Run
from .chat import ChatConfig
from .material import CACHE, Material

HELD_OUT = 0.02  # of the characters


class Conversations(Material):
    """The examples of a fine-tuning run, in packed rows."""

    def __init__(self, config: ChatConfig, console: Console) -> None:
        """Raises UsageError."""
        self.config: ChatConfig = config
        bar = Bar(console)
        with bar.progress:
            request = ChatRequest(
                config.data,
                config.validation,
                config.tokenizer,
                config.eos,
                config.allow_unknown,
                allow_malformed=config.allow_malformed,
                train_on=config.train_on,
                prompt_field=config.prompt_field,
                completion_field=config.completion_field,
                render=config.render,
                joint=config.joint,
                validation_fraction=HELD_OUT if config.validation_fraction is None else config.validation_fraction,
            )
            if config.validation_fraction is not None and texts.prepared(request):
                raise UsageError(
                    f"--validation-fraction: {config.data[0]} was prepared with what it holds out; leave it out"
                )
            folder = chats.cached(CACHE, request, bar)
            self.general = self._general(bar)
        self.tokenizer = tokenizer_of(folder)
        self.vocabulary = self.tokenizer.vocab_size
        self.examples, self.held_out = Examples(folder), Examples(folder, "validation")
        self.template = load_template(folder)
        self.rows = len(Packed(self.examples, config.sequence, longer=config.longer, pack=config.pack).rows)
        self.asked = self._asked()

    def task(self, run: Run) -> FinetuneTask:
        config = run.config
        assert isinstance(config, type(self.config))
        return FinetuneTask(
            run.model,
            self.examples,
            self.held_out,
            config.sequence,
            config=run.model.config.to_hf(),
            seed=config.seed,
            align=config.micro_batch * config.accumulation,
            eval_rows=config.eval_windows,
            longer=config.longer,
            pack=config.pack,
            general=self.general,
        )

    def in_words(self, run: Run, task: FinetuneTask) -> list[str]:
        config = run.config
        size, read = config.micro_batch * config.accumulation, len(task.held_out.rows)
        said = [
            *task.in_words()[1:],  # the format is said where the examples are read
            f"a step takes {size:,} rows, {size * config.sequence:,} tokens; the run is {config.steps:,} steps, "
            f"{config.steps * size / task.rows:.2f} epochs; an evaluation reads "
            f"{min(config.eval_windows, read):,} of {read:,} held-out rows, evenly spaced",
        ]
        if task.general is not None:
            said.append(
                f"general text: {len(task.general.tokens):,} tokens, of which an evaluation reads "
                f"{min(config.eval_windows, task.general.windows):,} of {task.general.windows:,} windows"
            )
        return said

    def more(self, out: Path) -> list[str | Path]:
        return [out, "--chat"] if self.template else [out]

    def show(self, task: FinetuneTask, console: Console) -> None:
        show(console, self.tokenizer, self.examples, task.train.fit.kept[0])

    def watch(self, run: Run, task: FinetuneTask, trainer: Trainer) -> None:
        trainer.after_evaluation = lambda metrics, step: self._sample(run, metrics, step)

    def told(self, metrics: Metrics) -> str:
        """Held-out answers and general text, at the first evaluation and at the last."""
        found = [record for record in metrics.history if "eval/loss" in record]
        if len(found) < 2:
            return ""
        (first, last), said = (found[0], found[-1]), list[str]()
        for name, key, form in (
            ("answers, nats per token", "eval/loss", ".4f"),
            ("answers, tokens foreseen", "eval/accuracy", ".1%"),
            ("general text, nats per token", "eval/general", ".4f"),
        ):
            if key in first and key in last:
                said.append(f"{name}: {first[key]:{form}} -> {last[key]:{form}}")
        return f"steps {first['step']} -> {last['step']}: {'; '.join(said)}"

    def _general(self, bar: Bar) -> Tokens | None:
        """The text that shows what is forgotten."""
        config = self.config
        if not config.general:
            return None
        request = Request(config.general, (), config.tokenizer, config.eos, config.allow_unknown)

        def report(what: str, done: int, total: int) -> None:
            if not what.startswith("held out"):  # it is never trained on
                bar(what, done, total)

        tokens = Tokens(texts.cached(CACHE, request, report))
        try:
            tokens.windows(config.sequence)
        except UsageError as error:
            raise UsageError(f"--general: {error}") from None
        return tokens

    def _asked(self) -> list[list[int]]:
        """The prompts of the samples, as tokens: the user's, or those of the first held-out examples."""
        if self.config.prompts:
            said = [[{"role": "user", "content": text}] for text in self.config.prompts]
            return [asking(self.tokenizer, self.template, messages, "--prompts") for messages in said]
        found = []
        for k in range(min(self.config.samples, len(self.held_out))):
            ids, trained = self.held_out.read(k)
            if start := int(trained.argmax()):
                found.append(ids[:start].tolist()[-self.config.sequence :])
        return found

    def _sample(self, run: Run, metrics: Metrics, step: int) -> None:
        """Print what the model answers now, and put it beside the numbers."""
        for k, ids in enumerate(self.asked):
            drawn = list(generate(run.model, ids, self.config.sample_tokens, temperature=0.0, eos=self.tokenizer.eos))
            prompt, answer = written(self.tokenizer, ids).strip(), self.tokenizer.decode(drawn).strip()
            metrics.say(f"sample {k + 1} at step {step}: … {' '.join(prompt[-200:].split())}\n  -> {answer}")
            metrics.writer.add_text(f"sample/{k + 1}", f"```\n{prompt}\n```\n\n```\n{answer}\n```", step)
