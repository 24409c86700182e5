"""Preparing data: documents become the token files that `windows` reads, once and restartably.

The output is a pure function of the request. Files are only ever appended to, and `progress.json` says how much of
them is certain, and up to which document; whatever lies beyond it when work goes on is cut off and made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.contract import UsageError

from ..atomic import alone, sha256, write_whole
from .files import find
from .index import INDEX, SCHEMA, read_index
from .losses import NOTHING_UNKNOWN, counted, in_words, refuse_malformed, refuse_unknown
from .shards import Shards, Table
from .split import SIDES, Side, Split, digest, hold_out
from .text import Passed, documents, standard_library
from .tokenizer import Tokenizer, load_tokenizer, train_bpe
from .unknown import Ids

PROGRESS = "progress.json"
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


def prepare(out: Path, request: Request, report: Report = lambda what, done, total: None) -> Path:
    """Make `out` the prepared folder of `request`, from the start or from where an earlier attempt got to.

    Returns `out`, at once where it is made already. Raises UsageError for data or a tokenizer that cannot be read, and
    for a folder that holds something else.
    """
    return _prepare(out, _Job(request, out), report)


def cached(cache: Path, request: Request, report: Report = lambda what, done, total: None) -> Path:
    """The prepared folder of `request` below `cache`, made if it is not there; data prepared already is returned.

    Raises UsageError also where that data was prepared with other settings than the request names.
    """
    if len(request.data) == 1 and (ready := Path(request.data[0]).expanduser()).is_dir() and (ready / INDEX).exists():
        _agrees(ready, request)
        return ready
    job = _Job(request, cache)
    name = hashlib.blake2b(json.dumps([SCHEMA, job.identity]).encode(), digest_size=8).hexdigest()
    return _prepare(cache / name, job, report)


class _Job:
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
        held, among, others = set(), 0, 0
        for file, text in read():
            key = digest(text)
            if file < len(self.given):
                held.add(key)
            elif key in held:
                among += 1
            else:
                others += 1
        if not others:
            raise UsageError("every document of the data is in the validation data too; expected some to train on")
        left_out = f"; {among:,} documents of the data are among them and left out of training" if among else ""
        return Split(frozenset(held), note=f"{len(held):,} documents, given separately{left_out}"), total


def _prepare(out: Path, job: _Job, report: Report) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, lambda: report(f"waiting for another process that prepares {out}", 0, 0)):
        if (out / INDEX).exists():
            index = read_index(out)
            _same(out, index["request"], job.identity)
            passed = Passed(**index["passed"])
            refuse_malformed(passed, job.request.field, job.request.allow_malformed)
            refuse_unknown(index["unknown"], index["characters"], job.request.allow_unknown)
            remarks = [
                *job.skipped,
                passed.in_words(job.request.field),
                in_words(index["unknown"], index["characters"]),
            ]
        else:
            state = _begin(out, job.identity)
            split, total = job.survey(report)
            for line in (
                *job.skipped,
                job.passed.in_words(job.request.field),
                f"held out for validation: {split.note}",
            ):
                _remark(line, report)
            _write(out / PROGRESS, state)
            tokenizer = job.tokenizer or _train(out, job, split, report)
            _remark(tokenizer.remark, report)
            tokenizer.copy_to(out)
            tables = _tokenise(out, job, split, tokenizer, state, total, lambda n: report("tokenising", n, total))
            job.expect_unchanged(out)
            remarks = [in_words(state["unknown"], state["characters"])]
            _finish(out, job, split, tokenizer, state, tables)
        (out / PROGRESS).unlink(missing_ok=True)
    for line in remarks:
        _remark(line, report)
    return out


def _agrees(ready: Path, request: Request) -> None:
    """Raises UsageError where a flag asks for something else than the folder holds; defaults ask for nothing."""
    index = read_index(ready)
    made = index["tokenizer"]
    there: dict[str, object] = {"field": index["request"].get("field")}
    asked: dict[str, object] = {}
    if request.tokenizer != "byte":
        there["tokenizer"], asked["tokenizer"] = made["fingerprint"], load_tokenizer(request.tokenizer).fingerprint
    if request.eos is not None:
        own = made["spec"] if made["spec"] == "byte" else str(ready / made["spec"])
        there["eos"], asked["eos"] = made["eos"], load_tokenizer(own, request.eos).eos
    if request.field != "text":
        asked["field"] = request.field
    if request.validation:
        there["validation"], asked["validation"] = "a part of the data held out", ", ".join(request.validation)
    for name, value in asked.items():
        if value != there[name]:
            raise UsageError(
                f"{ready}: prepared with {name} {there[name]}, asked for {value}; leave it out, or prepare again"
            )


def _remark(line: str, report: Report) -> None:
    if line:
        report(line, 0, 0)


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


def _begin(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state an earlier attempt left, or that of a beginning."""
    path = out / PROGRESS
    if path.exists():
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            request = state["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: damaged ({error!r}); delete {out} and start again") from None
        _same(out, request, identity)
        return state
    if others := sorted(file.name for file in out.iterdir() if file.suffix != ".tmp"):
        raise UsageError(f"{out}: holds {others[:3]} but no prepared data; choose an empty or a new folder")
    counts = {side: {"documents": 0, "tokens": 0} for side in SIDES}
    return {"request": identity, "next": [0, 0], "characters": 0, "unknown": dict(NOTHING_UNKNOWN), "splits": counts}


def _train(out: Path, job: _Job, split: Split, report: Report) -> Tokenizer:
    """The tokenizer trained on what is not held out; an earlier attempt may have left it."""
    path, size = out / "tokenizer.json", job.request.train_bpe
    if not path.exists():
        report(f"training a tokenizer of {size:,} tokens", 0, 0)
        texts = (text for batch in job.batches() for _, _, text in batch)
        kept = (part for text in texts for side, part in split.parts(text) if side == "train")
        write_whole(path, train_bpe(kept, size))
    tokenizer = load_tokenizer(str(path), job.request.eos)
    if tokenizer.vocab_size < size:
        report(f"the text gives no more than {tokenizer.vocab_size:,} tokens of the {size:,} asked for", 0, 0)
    return tokenizer


def _tokenise(
    out: Path,
    job: _Job,
    split: Split,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    total: int,
    done: Callable[[int], None],
) -> dict[Side, Table]:
    """Append the tokens of every document from `state` on, and commit after every batch; returns the files made.

    Raises UsageError as soon as more of the `total` characters than is allowed cannot be said.
    """
    dtype, counts = _dtype(tokenizer), state["splits"]
    shards = {side: Shards(out, side, dtype, job.request.shard_tokens, counts[side]["tokens"]) for side in SIDES}
    try:
        for batch in job.batches(state["next"]):
            texts: dict[Side, list[str]] = {side: [] for side in SIDES}
            places: dict[Side, list[str]] = {side: [] for side in SIDES}
            for file, number, text in batch:
                for side, part in split.parts(text):
                    if side == "train" or not job.given or file < len(job.given):
                        texts[side].append(part)
                        places[side].append(f"{job.files[file].name}, document {number + 1}")
            unknown = state["unknown"]
            for side in SIDES:
                packed = tokenizer.pack(texts[side])
                unknown = counted(unknown, packed, places[side])
                kept = [ids for ids in packed.ids if len(ids)]  # an end alone would be a document that says nothing
                shards[side].append(_join(tokenizer.eos, kept))
                shards[side].sync()
                counts[side]["documents"] += len(kept)
                counts[side]["tokens"] = shards[side].tokens
            refuse_unknown(unknown, total, job.request.allow_unknown)
            state["unknown"] = unknown
            state["characters"] += sum(len(text) for _, _, text in batch)
            state["next"] = [batch[-1][0], batch[-1][1] + 1]
            _write(out / PROGRESS, state)
            done(state["characters"])
    finally:
        for side in SIDES:
            shards[side].close()
    return {side: shards[side].table() for side in SIDES}


def _finish(
    out: Path, job: _Job, split: Split, tokenizer: Tokenizer, state: dict[str, Any], tables: dict[Side, Table]
) -> None:
    """Write the index, which makes the folder a prepared one. Raises UsageError where a side has no tokens."""
    for side, counts in state["splits"].items():
        if not counts["tokens"]:
            lost = in_words(state["unknown"], state["characters"]) or "no text"
            raise UsageError(f"{side}: {lost}; expected tokens: give another tokenizer or more text, and delete {out}")
    index = {
        "schema": SCHEMA,
        "dtype": _dtype(tokenizer).name,
        "tokenizer": {
            "spec": tokenizer.files[0].name if tokenizer.files else tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
        },
        "held_out": split.note,
        "characters": state["characters"],
        "passed": asdict(job.passed),
        "unknown": state["unknown"],
        "splits": {
            side: counts | {"shards": tables[side], "sha256": sha256(out / shard["file"] for shard in tables[side])}
            for side, counts in state["splits"].items()
        },
        "request": job.identity,
    }
    _write(out / INDEX, index)


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _join(eos: int, documents: list[Ids]) -> Ids:
    """The tokens of all documents, each followed by `eos`."""
    end = np.array([eos], np.uint32)
    return np.concatenate([np.array([], np.uint32), *(part for ids in documents for part in (ids, end))])


def _same(out: Path, here: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        got = here.get(name)
        if got == value:
            continue
        if isinstance(got, list) and isinstance(value, list):
            first = next((k for k in range(len(got)) if got[k : k + 1] != value[k : k + 1]), len(got))
            got, value = ([*files[first : first + 1], f"{len(files)} files"] for files in (got, value))
        raise UsageError(
            f"{out}: prepared with {name} {got}, asked for {value}; choose another folder or delete this one"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")
