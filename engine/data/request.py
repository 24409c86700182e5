"""What to prepare: a request, its files found and read, and all that the prepared tokens depend on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizers.contract import UsageError

from ..atomic import sha256
from .files import find
from .losses import refuse_malformed
from .split import Split, digest, hold_out
from .text import Passed, documents, standard_library
from .tokenizer import load_tokenizer

BATCH = 1 << 22  # characters tokenised, and then committed, at once

Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much; 0 of 0: a remark


@dataclass(frozen=True)
class Request:
    """What to prepare. Equal content gives byte-identical output, wherever the files lie."""

    data: tuple[str, ...] = ()
    """Files of text (.txt .md .py ...) or rows (.jsonl .json .csv .tsv .parquet .arrow), also as .gz .xz .bz2 .zst;
    folders or glob patterns of these; none: Python's standard library."""
    validation: tuple[str, ...] = ()
    """The same, for validation; none: a part of the data is held out, chosen by a hash of each document's content."""
    tokenizer: str = "byte"
    """"byte", a tokenizer.json, GPT-2's pair of files, BERT's vocab.txt, a sentencepiece .model, or a folder that holds
    one of these."""
    eos: str | None = None
    """The token, or its id, that ends every document. None: what tokenizer_config.json, generation_config.json or
    config.json beside the tokenizer name, else the first of a list of usual ones."""
    allow_unknown: float = 0.01
    """The share of the characters that the tokenizer may be unable to say; above it, nothing is prepared."""
    field: str = "text"
    """The field, or column, of a row that holds its text."""
    allow_malformed: float = 0.0
    """The share of the rows that may be malformed (not UTF-8, not JSON, no string): left out and counted. Above it,
    nothing is prepared; 0 stops at the first."""
    train_bpe: int = 0
    """Train a byte-level BPE of this vocabulary size on the training text, and use it instead of a given tokenizer."""
    validation_fraction: float = 0.005
    """The share of the text that is held out where no validation data is given."""
    shard_tokens: int = 1 << 27
    """Tokens in a file, at most."""


class Job:
    """A request, its files found and its tokenizer loaded. `identity` is all that the output depends on."""

    def __init__(self, request: Request, output: Path) -> None:
        if request.train_bpe and request.tokenizer != "byte":
            raise UsageError(
                f"train_bpe: got {request.train_bpe}, and tokenizer {request.tokenizer!r}; give one of them"
            )
        if request.shard_tokens < 1:
            raise UsageError(f"shard_tokens: got {request.shard_tokens}; expected at least 1")
        for name in ("allow_unknown", "allow_malformed"):
            if not 0 <= getattr(request, name) <= 1:
                raise UsageError(f"{name}: got {getattr(request, name)}; expected a share, from 0 to 1")
        self.request = request
        held, train = find(request.validation, output), find(request.data, output)
        self.given, self.skipped = held.files, held.skipped + train.skipped
        self.files = self.given + (train.files if request.data else standard_library())
        self.tokenizer = None if request.train_bpe else load_tokenizer(request.tokenizer, request.eos)
        self.read_at = [_when(path) for path in self.files]
        inputs = [
            f"{path.name} {size} {_content(path)}" for path, (size, _) in zip(self.files, self.read_at, strict=True)
        ]
        self.passed = Passed()  # what `survey` finds
        self.identity: dict[str, Any] = {
            "data": inputs[len(self.given) :],
            "validation": inputs[: len(self.given)],
            "field": request.field,
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else f"trained, {request.train_bpe}",
            "eos": self.tokenizer.eos if self.tokenizer else request.eos,
            "validation_fraction": None if self.given else request.validation_fraction,
            "shard_tokens": request.shard_tokens,
        }

    def batches(
        self, start: Sequence[int] = (0, 0), passed: Passed | None = None
    ) -> Iterator[list[tuple[int, int, str]]]:
        """All documents from `start` on, as (file, number in it, text), in lists of at least BATCH characters."""
        field, skip = self.request.field, self.request.allow_malformed > 0
        batch, size = [], 0
        for file, path in enumerate(self.files[start[0] :], start[0]):
            for number, text in enumerate(documents(path, field, passed, skip)):
                if (file, number) >= tuple(start):
                    batch.append((file, number, text))
                    size += len(text)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def expect_unchanged(self, out: Path) -> None:
        """Raises UsageError where a file has changed since it was first looked at: the tokens may be of either."""
        for path, before in zip(self.files, self.read_at, strict=True):
            if _when(path) != before:
                raise UsageError(f"{path}: changed while it was read; delete {out} and start again")

    def survey(self, report: Report) -> tuple[Split, int]:
        """Read everything once: what is held out, and how many characters there are. Unreadable data shows here."""
        total = 0

        def read() -> Iterator[tuple[int, str]]:
            nonlocal total
            seen, passed = 0, Passed()
            for batch in self.batches(passed=passed):
                report("reading", batch[0][0], len(self.files))
                for file, _, text in batch:
                    seen += len(text)
                    yield file, text
            report("reading", len(self.files), len(self.files))
            refuse_malformed(passed, self.request.field, self.request.allow_malformed)
            total, self.passed = seen, passed

        if not self.given:
            split = hold_out(lambda: (text for _, text in read()), self.request.validation_fraction)
            return split, total
        return separate(read(), len(self.given), "document"), total


def separate(texts: Iterator[tuple[int, str]], given: int, thing: str) -> Split:
    """The split where the first `given` files are the validation data: `texts` are all, each with its file's number.

    Raises UsageError where nothing is left to train on.
    """
    held, among, others = set(), 0, 0
    for file, text in texts:
        key = digest(text)
        if file < given:
            held.add(key)
        elif key in held:
            among += 1
        else:
            others += 1
    if not others:
        raise UsageError(f"every {thing} of the data is in the validation data too; expected some to train on")
    left_out = f"; {among:,} {thing}s of the data are among them and left out of training" if among else ""
    return Split(frozenset(held), note=f"{len(held):,} {thing}s, given separately{left_out}")


def _when(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file. Raises UsageError where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    return found.st_size, found.st_mtime_ns


def _content(path: Path) -> str:
    try:
        return sha256([path])[:16]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
