"""What a model can do: `python -m tools.evaluate RUN|DIR --task gsm8k --data test.jsonl`.

    --task gsm8k        questions with answers that end in a number: the share that the model answers with that number.
                        Greedy, by the model's chat template, without examples; fields "question" and "answer", or rows
                        of MAWPS
    --task perplexity   text: its loss, nats per token, in windows of --sequence tokens

RUN is a run's folder, a step-* folder, or a folder with a model as Hugging Face publishes it. Exit codes: 0 done,
1 failure, 2 bad arguments, 5 an unusable checkpoint.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from engine.data import Batches, Tokens
from engine.data.chat.asking import asking
from engine.data.chat.masks import Fault
from engine.data.chat.mawps import is_mawps, pair
from engine.data.files import find as files
from engine.data.prepare import cached
from engine.data.request import Request
from engine.data.text import reading
from engine.data.tokenizer import Tokenizer
from engine.terminal.flags import ask
from models import weights
from models.sampling import answers
from models.segment import IGNORED
from models.weights import Model
from optimizers.contract import UsageError

from . import chat
from .generate import find, load_model, tokenizer_of

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Evaluate:
    run: tyro.conf.Positional[Path]
    """A run's folder, of which the newest whole checkpoint is used, one step-* folder, or a Hugging Face folder."""
    task: Literal["gsm8k", "perplexity"]
    """What is asked of the model."""
    data: tuple[str, ...]
    """Files of questions, or of text."""
    limit: int | None = None
    """Only so many of them: the first questions, or evenly spaced windows."""
    batch: int = 16
    """Questions that are answered, or windows that are read, at once."""
    max_new_tokens: int = 256
    """gsm8k: where an answer is cut off."""
    sequence: int = 1024
    """perplexity: tokens in a window."""
    checkpoint: int | None = None
    """The step to use instead of the newest."""
    device: str = "auto"
    """"auto" takes CUDA where it is, else the CPU."""


class Question(NamedTuple):
    text: str
    number: Decimal


def evaluate(config: Evaluate) -> None:
    """Print one line of figures. Raises UsageError, CheckpointError."""
    for name, value in (("limit", config.limit), ("batch", config.batch), ("sequence", config.sequence)):
        if value is not None and value < 1:
            raise UsageError(f"--{name}: got {value}, expected at least 1")
    try:
        folder = find(config.run, config.checkpoint).path
        assert folder is not None
        cuda = config.device == "auto" and torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu" if config.device == "auto" else config.device)
        tokenizer, model = tokenizer_of(folder), load_model(folder, device)
        weights.check_vocabulary(tokenizer.vocab_size, model.config, tokenizer.name, folder)
        if config.task == "gsm8k":
            print(exact_match(config, model, tokenizer, chat.beside(folder, None)))
        else:
            print(perplexity(config, model, tokenizer, chat.beside(folder, None)))
    except UsageError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error).splitlines()[0]) from None


def exact_match(config: Evaluate, model: Model, tokenizer: Tokenizer, beside: Path) -> str:
    """Questions in the order of their length, so that those answered together are of about one. Raises ValueError."""
    questions = list(_questions(config.data))[: config.limit]
    template, ends = chat.template_of(beside), chat.settings(beside, tokenizer).ends
    asked = [asking(tokenizer, template, [{"role": "user", "content": q.text}], "--data") for q in questions]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    right = cut = 0
    for first in range(0, len(order), config.batch):
        own = order[first : first + config.batch]
        for i, new in zip(own, answers(model, [asked[i] for i in own], config.max_new_tokens, ends), strict=True):
            right += number_of(tokenizer.decode(new)) == questions[i].number
            cut += len(new) == config.max_new_tokens
    return (
        f"gsm8k: exact match {right:,} of {len(questions):,}, {right / len(questions):.1%} (greedy, no examples, "
        f"{cut:,} answers cut off at {config.max_new_tokens:,} tokens)"
    )


def perplexity(config: Evaluate, model: Model, tokenizer: Tokenizer, beside: Path) -> str:
    """Raises ValueError."""
    folder = cached(Path("runs/.data"), Request(config.data, (), str(beside) if tokenizer.files else "byte"))
    tokens = Tokens(folder)
    total, count, device = 0.0, 0, model.embedding.device
    with torch.no_grad():
        for batch in Batches(tokens, config.sequence).evaluation(config.batch, config.limit):
            known = int((batch["targets"] != IGNORED).sum())
            total += float(model.loss(batch["input_ids"].to(device), batch["targets"].to(device))) * known
            count += known
    return f"perplexity: {math.exp(total / count):.3f}, {total / count:.4f} nats per token over {count:,} tokens"


def number_of(text: str) -> Decimal | None:
    """The number behind "####", or else the last one of a text; None where there is none."""
    found = NUMBER.findall(text.rpartition("####")[2]) or NUMBER.findall(text)
    behind = "####" in text and bool(NUMBER.findall(text.rpartition("####")[2]))
    try:
        return Decimal(found[0 if behind else -1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _questions(data: tuple[str, ...]) -> Iterator[Question]:
    """Raises UsageError for a row without a question, or whose answer has no number."""
    for path in files(data).files:
        for row in reading(path, None):
            record = row.record or {}
            try:
                question, answer = pair(record) if is_mawps(record) else (record.get("question"), record.get("answer"))
            except Fault as error:
                raise UsageError(f"{path}, {row.place}: {error}") from None
            number = number_of(answer) if isinstance(answer, str) else None
            if not isinstance(question, str) or number is None:
                raise UsageError(
                    f"{path}, {row.place}: {row.fault or f'got the fields {sorted(record)}'}; expected a question, and "
                    "an answer with a number"
                )
            yield Question(question, number)


if __name__ == "__main__":
    from recipes.cli import main

    main(lambda args: ask(lambda prog: tyro.cli(Evaluate, args=args, description=__doc__, prog=prog)), evaluate)
