"""Preparing data: documents become the token files that `windows` reads, once and restartably.

The output is a pure function of the request. Files are only ever appended to, and `progress.json` says how much of
them is certain, and up to which document; whatever lies beyond it when work goes on is cut off and made again.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.contract import UsageError

from ..atomic import alone, sha256, write_whole
from .index import INDEX, SCHEMA, read_index
from .losses import NOTHING_UNKNOWN, counted, in_words, refuse_malformed, refuse_unknown
from .request import Job, Report, Request
from .shards import Shards, Table
from .split import SIDES, Side, Split
from .text import Passed
from .tokenizer import Tokenizer, load_tokenizer, train_bpe
from .unknown import Ids

PROGRESS = "progress.json"


def prepare(out: Path, request: Request, report: Report = lambda what, done, total: None) -> Path:
    """Make `out` the prepared folder of `request`, from the start or from where an earlier attempt got to.

    Returns `out`, at once where it is made already. Raises UsageError for data or a tokenizer that cannot be read, and
    for a folder that holds something else.
    """
    return _prepare(out, Job(request, out), report)


def cached(cache: Path, request: Request, report: Report = lambda what, done, total: None) -> Path:
    """The prepared folder of `request` below `cache`, made if it is not there; data prepared already is returned.

    Raises UsageError also where that data was prepared with other settings than the request names.
    """
    if ready := prepared(request):
        _agrees(ready, request)
        return ready
    job = Job(request, cache)
    return _prepare(cache / named(job), job, report)


def prepared(request: Request) -> Path | None:
    """The prepared folder that a request names as its data, if it does."""
    ready = Path(request.data[0]).expanduser() if len(request.data) == 1 else None
    return ready if ready and ready.is_dir() and (ready / INDEX).exists() else None


def named(job: Job) -> str:
    """The name of a job's folder in a cache, equal for equal output."""
    return hashlib.blake2b(json.dumps([SCHEMA, job.identity]).encode(), digest_size=8).hexdigest()


def _prepare(out: Path, job: Job, report: Report) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, lambda: report(f"waiting for another process that prepares {out}", 0, 0)):
        if (out / INDEX).exists():
            index = read_index(out)
            expect_same(out, index["request"], job.identity)
            passed = Passed(**index["passed"])
            refuse_malformed(passed, job.request.field, job.request.allow_malformed)
            refuse_unknown(index["unknown"], index["characters"], job.request.allow_unknown)
            remarks = [
                *job.skipped,
                passed.in_words(job.request.field),
                in_words(index["unknown"], index["characters"]),
            ]
        else:
            state = begin(out, job.identity)
            split, total = job.survey(report)
            for line in (
                *job.skipped,
                job.passed.in_words(job.request.field),
                f"held out for validation: {split.note}",
            ):
                remark(line, report)
            commit(out / PROGRESS, state)
            tokenizer = job.tokenizer or _train(out, job, split, report)
            remark(tokenizer.remark, report)
            tokenizer.copy_to(out)
            tables = _tokenise(out, job, split, tokenizer, state, total, lambda n: report("tokenising", n, total))
            job.expect_unchanged(out)
            remarks = [in_words(state["unknown"], state["characters"])]
            _finish(out, job, split, tokenizer, state, tables)
        (out / PROGRESS).unlink(missing_ok=True)
    for line in remarks:
        remark(line, report)
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


def remark(line: str, report: Report) -> None:
    """Report a line, unless it is empty."""
    if line:
        report(line, 0, 0)


def begin(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state an earlier attempt left, or that of a beginning."""
    path = out / PROGRESS
    if path.exists():
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            request = state["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: damaged ({error!r}); delete {out} and start again") from None
        expect_same(out, request, identity)
        return state
    if others := sorted(file.name for file in out.iterdir() if file.suffix != ".tmp"):
        raise UsageError(f"{out}: holds {others[:3]} but no prepared data; choose an empty or a new folder")
    counts = {side: {"documents": 0, "tokens": 0} for side in SIDES}
    return {"request": identity, "next": [0, 0], "characters": 0, "unknown": dict(NOTHING_UNKNOWN), "splits": counts}


def _train(out: Path, job: Job, split: Split, report: Report) -> Tokenizer:
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
    job: Job,
    split: Split,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    total: int,
    done: Callable[[int], None],
) -> dict[Side, Table]:
    """Append the tokens of every document from `state` on, and commit after every batch; returns the files made.

    Raises UsageError as soon as more of the `total` characters than is allowed cannot be said.
    """
    dtype, counts = id_dtype(tokenizer), state["splits"]
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
            commit(out / PROGRESS, state)
            done(state["characters"])
    finally:
        for side in SIDES:
            shards[side].close()
    return {side: shards[side].table() for side in SIDES}


def _finish(
    out: Path, job: Job, split: Split, tokenizer: Tokenizer, state: dict[str, Any], tables: dict[Side, Table]
) -> None:
    """Write the index, which makes the folder a prepared one. Raises UsageError where a side has no tokens."""
    for side, counts in state["splits"].items():
        if not counts["tokens"]:
            lost = in_words(state["unknown"], state["characters"]) or "no text"
            raise UsageError(f"{side}: {lost}; expected tokens: give another tokenizer or more text, and delete {out}")
    index = {
        "schema": SCHEMA,
        "dtype": id_dtype(tokenizer).name,
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
    commit(out / INDEX, index)


def id_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest in which every id fits."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _join(eos: int, documents: list[Ids]) -> Ids:
    """The tokens of all documents, each followed by `eos`."""
    end = np.array([eos], np.uint32)
    return np.concatenate([np.array([], np.uint32), *(part for ids in documents for part in (ids, end))])


def expect_same(out: Path, here: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises UsageError where `out` was prepared of something else than is asked for."""
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


def commit(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
