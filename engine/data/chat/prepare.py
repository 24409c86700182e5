"""Preparing conversations: token files, with the same of masks and of borders beside them, once and restartably.

Beside the files that every prepared folder has, a split has `mask-…` files, one byte a token (1: trained), and
`examples-…` files, four little-endian int64 an example: its tokens, those of them that are trained, its file (by its
place in the request) and its line. As for tokens, what lies beyond what `progress.json` says is made again.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.contract import UsageError

from ...atomic import alone, sha256, write_whole
from ..ending import TOKENIZER_CONFIG, read_beside
from ..index import INDEX, SCHEMA, read_index
from ..losses import counted, in_words, refuse_unknown, several
from ..prepare import PROGRESS, begin, commit, expect_same, id_dtype, named, prepared, remark
from ..request import Report
from ..shards import Shards
from ..split import SIDES, Side, Split, digest
from ..tokenizer import Tokenizer, load_tokenizer
from ..unknown import Packed
from .encode import Encoded, encode
from .request import ChatJob, ChatRequest, Item
from .template import FILE

COLUMNS = 4  # of the table of examples
EXAMPLES = 1 << 22  # in a file of that table
KIND = "conversations"


def prepare(out: Path, request: ChatRequest, report: Report = lambda what, done, total: None) -> Path:
    """Make `out` the prepared folder of `request`, from the start or from where an earlier attempt got to.

    Returns `out`, at once where it is made already. Raises UsageError for data, a template or a tokenizer that cannot
    be read, for an example that cannot be trained on, and for a folder that holds something else.
    """
    return _prepare(out, ChatJob(request, out), report)


def cached(cache: Path, request: ChatRequest, report: Report = lambda what, done, total: None) -> Path:
    """The prepared folder of `request` below `cache`, made if it is not there; data prepared already is returned.

    Raises UsageError also where that data was prepared with other settings than the request names.
    """
    if ready := prepared(request):
        _agrees(ready, request)
        return ready
    job = ChatJob(request, cache)
    return _prepare(cache / named(job), job, report)


def _agrees(ready: Path, request: ChatRequest) -> None:
    """Raises UsageError where a flag asks for something else than the folder holds; defaults ask for nothing."""
    index = conversations_in(ready)
    made = index["request"][KIND]
    names = {"prompt_field": made["fields"][0], "completion_field": made["fields"][1]}
    there = {**{name: made[name] for name in ("train_on", "render", "joint")}, **names}
    default = {field.name: field.default for field in fields(ChatRequest)}
    asked = {name: getattr(request, name) for name in there if getattr(request, name) != default[name]}
    if request.tokenizer != "byte":
        there["tokenizer"] = index["tokenizer"]["fingerprint"]
        asked["tokenizer"] = load_tokenizer(request.tokenizer, request.eos).fingerprint
    if request.validation:
        there["validation"], asked["validation"] = "a part of the data held out", ", ".join(request.validation)
    for name, value in asked.items():
        if value != there[name]:
            raise UsageError(
                f"{ready}: prepared with {name} {there[name]!r}, asked for {value!r}; leave it out, or prepare again"
            )


def conversations_in(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder. Raises UsageError where it holds no conversations."""
    index = read_index(folder)
    if index.get("kind") != KIND:
        raise UsageError(f"{folder}: holds text without masks, expected conversations; prepare them with --chat")
    return index


def _prepare(out: Path, job: ChatJob, report: Report) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, lambda: report(f"waiting for another process that prepares {out}", 0, 0)):
        if (out / INDEX).exists():
            index = read_index(out)
            expect_same(out, index["request"], job.identity)
            if index["passed"]["malformed"] > job.request.allow_malformed * index["passed"]["rows"]:
                raise UsageError(f"{out}: prepared with malformed rows left out; use --allow-malformed as then")
            refuse_unknown(index["unknown"], index["characters"], job.request.allow_unknown)
            remarks = [index["format"], in_words(index["unknown"], index["characters"])]
        else:
            remarks = _make(out, job, report)
        (out / PROGRESS).unlink(missing_ok=True)
    for line in remarks:
        remark(line, report)
    return out


def _make(out: Path, job: ChatJob, report: Report) -> list[str]:
    """Prepare what no earlier attempt has; returns what is to be said at the end."""
    state = begin(out, job.identity)
    for counts in state["splits"].values():
        counts.setdefault("trained", 0)
    state.setdefault("across", 0)
    split, total = job.survey(report)
    dated = job.template is not None and job.template.dated
    date = f"the chat template writes a date: {job.request.template_date} (--template-date)" if dated else ""
    said = (job.format_in_words(), date, job.marks_in_words(), job.passed.in_words(KIND), f"held out: {split.note}")
    for line in (*job.skipped, *said):
        remark(line, report)
    commit(out / PROGRESS, state)
    assert job.tokenizer is not None
    remark(job.tokenizer.remark, report)
    _keep(out, job, job.tokenizer)
    tables = _tokenise(out, job, split, job.tokenizer, state, total, lambda n: report("tokenising", n, total))
    job.expect_unchanged(out)
    _finish(out, job, split, job.tokenizer, state, tables)
    across = state["across"]
    border = f"{several(across, 'token')} across the border of an answer; trained" if across else ""
    return [border, in_words(state["unknown"], state["characters"])]


def _keep(out: Path, job: ChatJob, tokenizer: Tokenizer) -> None:
    """Put tokenizer and template into the folder, so that they are loaded the same from there."""
    tokenizer.copy_to(out)
    if job.template is not None:
        write_whole(out / FILE, job.template.source)
        config = {**read_beside(out, TOKENIZER_CONFIG), **job.template.special}
        write_whole(out / TOKENIZER_CONFIG, json.dumps(config, indent=1) + "\n")


def _tokenise(
    out: Path,
    job: ChatJob,
    split: Split,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    total: int,
    done: Callable[[int], None],
) -> dict[Side, "_Files"]:
    """Append every example from `state` on, and commit after every batch; returns the files made."""
    files = {side: _Files(out, side, tokenizer, job.request.shard_tokens, state["splits"][side]) for side in SIDES}
    try:
        for batch in job.examples(state["next"]):
            sides: dict[Side, list[Item]] = {side: [] for side in SIDES}
            for item in batch:
                side: Side = "validation" if digest(item.example.text) in split.held else "train"
                if side == "train" or not job.given or item.file < len(job.given):
                    sides[side].append(item)
            unknown = state["unknown"]
            for side, items in sides.items():
                encoded = encode(tokenizer, [item.example for item in items])
                places = [job.place(item.file, item.number) for item in items]
                for found, where in zip(encoded, places, strict=True):
                    if not found.trained.any():
                        raise UsageError(f"{where}: no token is trained; remove the example, or --train-on all")
                packed = Packed([found.ids for found in encoded], [found.lost for found in encoded])
                unknown = counted(unknown, packed, places)
                state["across"] += sum(found.across for found in encoded)
                files[side].append(encoded, items)
                state["splits"][side] = files[side].counts()
            refuse_unknown(unknown, total, job.request.allow_unknown)
            state["unknown"] = unknown
            state["characters"] += sum(len(item.example.text) for item in batch)
            state["next"] = [batch[-1].file, batch[-1].row + 1]
            commit(out / PROGRESS, state)
            done(state["characters"])
    finally:
        for one in files.values():
            one.close()
    return files


class _Files:
    """Tokens, masks and examples of one side, appended to together. What lies beyond `counts` is cut off first."""

    def __init__(self, out: Path, side: Side, tokenizer: Tokenizer, capacity: int, counts: dict[str, int]) -> None:
        documents, tokens = counts["documents"], counts["tokens"]
        self.documents, self.trained = documents, counts["trained"]
        self.tokens = Shards(out, side, id_dtype(tokenizer), capacity, tokens)
        self.masks = Shards(out, f"mask-{side}", np.dtype("u1"), capacity, tokens)
        table, size = np.dtype("<i8"), COLUMNS * EXAMPLES
        self.examples = Shards(out, f"examples-{side}", table, size, COLUMNS * documents)
        self.all = (self.tokens, self.masks, self.examples)

    def append(self, encoded: list[Encoded], items: list[Item]) -> None:
        """Append, and return when it is on the disk."""
        if not encoded:
            return
        self.tokens.append(np.concatenate([found.ids for found in encoded]))
        self.masks.append(np.concatenate([found.trained for found in encoded]))
        rows = [
            (len(found.ids), int(found.trained.sum()), item.file, item.number)
            for found, item in zip(encoded, items, strict=True)
        ]
        self.examples.append(np.array(rows, np.int64).flatten())
        self.documents += len(rows)
        self.trained += sum(row[1] for row in rows)
        for files in self.all:
            files.sync()

    def counts(self) -> dict[str, int]:
        return {"documents": self.documents, "tokens": self.tokens.tokens, "trained": self.trained}

    def close(self) -> None:
        for files in self.all:
            files.close()

    def index(self) -> dict[str, Any]:
        """What the folder's index says of this side; the hash is that of all its files."""
        tables = {"shards": self.tokens.table(), "masks": self.masks.table(), "examples": self.examples.table()}
        names = [self.tokens.folder / entry["file"] for table in tables.values() for entry in table]
        return {**self.counts(), **tables, "sha256": sha256(names)}


def _finish(
    out: Path, job: ChatJob, split: Split, tokenizer: Tokenizer, state: dict[str, Any], files: dict[Side, _Files]
) -> None:
    """Write the index, which makes the folder a prepared one. Raises UsageError where a side has no example."""
    for side, counts in state["splits"].items():
        if not counts["documents"]:
            raise UsageError(f"{side}: no example; expected some: give more data, and delete {out}")
    index = {
        "schema": SCHEMA,
        "kind": KIND,
        "dtype": id_dtype(tokenizer).name,
        "tokenizer": {
            "spec": tokenizer.files[0].name if tokenizer.files else tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
        },
        "format": job.format_in_words(),
        "files": [path.name for path in job.files],
        "held_out": split.note,
        "characters": state["characters"],
        "passed": asdict(job.passed),
        "unknown": state["unknown"],
        "across": state["across"],
        "splits": {side: one.index() for side, one in files.items()},
        "request": job.identity,
    }
    commit(out / INDEX, index)
