"""What to prepare of conversations: a request, its files read, and all that the prepared tokens depend on."""

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from optimizers.contract import UsageError

from .. import request as requests
from ..files import COLUMNS, ROWS, find, kind
from ..losses import refuse_malformed, several
from ..request import Job, Report, Request, separate
from ..split import LARGEST, Split, digest
from ..text import Passed, reading, unwritable
from .formats import KNOWN, Fields, Format, Said, format_of, said
from .masks import Example, Fault, TrainOn, plain, rendered
from .template import FILE, load_template


@dataclass(frozen=True)
class ChatRequest(Request):
    """What to prepare where rows are conversations, or pairs of a prompt and what to answer."""

    train_on: TrainOn = "assistant"
    """What is trained: every answer, the last one alone, or all tokens."""
    prompt_field: str = ""
    """The field that holds the prompt, where it is not "prompt"."""
    completion_field: str = ""
    """The field that holds what to answer, where it is not "completion"."""
    render: Literal["auto", "template", "plain"] = "auto"
    """Put prompt and completion into the checkpoint's chat template, or join them as plain texts; auto: the template
    where there is one."""
    joint: str = ""
    """What stands between prompt and completion where they are joined as plain texts."""
    template_date: str = "2024-07-26"
    """What a template that writes today's date takes for today, so that the same data gives the same tokens."""


class Item(NamedTuple):
    """An example in its place: row `row` of file `file`, counted from 0, which is line (or row) `number`."""

    file: int
    row: int
    number: int
    example: Example


class ChatJob(Job):
    """A request for conversations, its files found, tokenizer and template loaded. `formats` is what `survey` finds."""

    request: ChatRequest

    def __init__(self, request: ChatRequest, output: Path) -> None:
        if not request.data:
            raise UsageError("--data: got none; expected files of conversations")
        if request.train_bpe:
            raise UsageError("--train-bpe: conversations are put into the marks of a checkpoint's tokenizer; give that")
        if request.field != "text":
            raise UsageError(
                f"--field {request.field}: names the text of rows that are no conversations; name the fields of pairs "
                "with --prompt-field and --completion-field"
            )
        if bool(request.prompt_field) != bool(request.completion_field):
            raise UsageError("--prompt-field and --completion-field belong together; got one of them, give both")
        super().__init__(request, output)
        try:
            date = datetime.date.fromisoformat(request.template_date)
        except ValueError:
            raise UsageError(f"--template-date: got {request.template_date!r}; expected a date, 2024-07-26") from None
        self.folder = _folder(request.tokenizer)
        self.template = load_template(self.folder, date) if self.folder and request.render != "plain" else None
        if request.render == "template" and self.template is None:
            raise UsageError(self._no_template("--render template"))
        self.fields = Fields(request.prompt_field, request.completion_field)
        self.formats: dict[str, str] = {}  # by file
        self.marked, self.first_marked = 0, ""  # rows whose own text holds a mark, as far as the survey has read
        marks = sorted(map(re.escape, self.tokenizer.marks.values())) if self.tokenizer and self.tokenizer.files else []
        self._nothing = Passed()  # counts what the survey has counted
        self._mark = re.compile("|".join(marks)) if marks else None
        self.identity["conversations"] = {
            "template": self.template.fingerprint if self.template else None,
            "date": request.template_date if self.template and self.template.dated else None,
            "train_on": request.train_on,
            "render": request.render,
            "joint": request.joint,
            "fields": list(self.fields),
        }

    def examples(self, start: Sequence[int] = (0, 0), passed: Passed | None = None) -> Iterator[list[Item]]:
        """All examples from `start` (file, row) on, in lists of at least BATCH characters. Raises UsageError for a row
        that is malformed or cannot be trained on, with its place, unless such rows are allowed."""
        batch: list[Item] = []
        size = 0
        for file in range(start[0], len(self.files)):
            for item in self._of(file, passed or self._nothing):
                if (item.file, item.row) >= tuple(start):
                    batch.append(item)
                    size += len(item.example.text)
                if size >= requests.BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def survey(self, report: Report) -> tuple[Split, int]:
        """Read everything once: what is held out, and how many characters there are. Unreadable data shows here."""
        seen, passed = 0, Passed()

        def read() -> Iterator[tuple[int, str]]:
            nonlocal seen
            for batch in self.examples(passed=passed):
                report("reading", batch[0].file, len(self.files))
                for item in batch:
                    seen += len(item.example.text)
                    yield item.file, item.example.text
            report("reading", len(self.files), len(self.files))
            refuse_malformed(passed, "conversation", self.request.allow_malformed)

        if self.given:
            split = separate(read(), len(self.given), "example")
        else:
            split = _hold_out(read(), self.request.validation_fraction)
        self.passed = passed
        return split, seen

    def format_in_words(self) -> str:
        """What was found, one line."""
        forms = list(dict.fromkeys(self.formats.values()))
        one = f"format: {forms[0]}" if len(forms) == 1 else f"formats: {self.formats}"
        used = "the checkpoint's chat template" if self.template else "plain texts, without a template"
        return f"{one}; put into {used}; trained: {self.request.train_on}"

    def marks_in_words(self) -> str:
        """One line on rows whose own text holds what the tokenizer reads as a mark; empty where there is none."""
        if not self.marked:
            return ""
        examples = several(self.marked, "example")
        return f"{examples} with a mark in the text itself, read as one; the first: {self.first_marked}"

    def place(self, file: int, number: int) -> str:
        """Where an example stands, for messages."""
        return place(str(self.files[file]), number)

    def _of(self, file: int, passed: Passed) -> Iterator[Item]:
        path, form, found = self.files[file], None, False
        for k, row in enumerate(reading(path, None)):
            passed.rows += 1
            fault, example, spoken = row.fault, None, Said()
            if not fault and row.record is not None:
                form = form or self._format(path, row.record)
                try:
                    spoken = said(row.record, form, self.fields, self.request.joint)
                    example = self._example(path, spoken, form)
                    fault = unwritable(example.text)
                except Fault as error:
                    fault = str(error)
            if fault and not self.request.allow_malformed:
                raise UsageError(f"{path}, {row.place}: {fault}")
            if fault or example is None:
                passed.malformed += 1
                passed.first_malformed = passed.first_malformed or f"{path.name}, {row.place}: {fault}"
                continue
            found = True
            if passed is not self._nothing and (mark := self._mark_in(spoken)):
                self.marked += 1
                self.first_marked = self.first_marked or f"{mark!r} in {path.name}, {row.place}"
            yield Item(file, k, int(row.place.split()[-1]), example)
        if not found:
            raise UsageError(f"{path}: no example to train on; expected rows of {KNOWN}")

    def _mark_in(self, row: Said) -> str:
        """The first mark that a row's own text holds."""
        contents = [message.get("content") for message in row.messages] or [text for text, _ in row.parts]
        found = (self._mark.search(text) for text in contents if self._mark and isinstance(text, str))
        return next((match.group() for match in found if match), "")

    def _format(self, path: Path, record: Any) -> Format:
        form = format_of(record, self.fields)
        if form is None:
            raise UsageError(
                f"{path}: got the fields {sorted(record)}; expected {KNOWN}; name the fields of other pairs with "
                "--prompt-field and --completion-field"
            )
        self.formats[path.name] = form
        return form

    def _example(self, path: Path, row: Said, form: Format) -> Example:
        if self.template and row.messages:
            return rendered(self.template, row.messages, self.request.train_on, row.answers, row.tools)
        if row.parts:
            return plain(row.parts, self.request.train_on)
        if self.request.render == "plain":
            raise UsageError(f"{path}: {form} cannot be plain texts; expected prompt and completion, or --render auto")
        raise UsageError(self._no_template(f"{path}: {form}"))

    def _no_template(self, what: str) -> str:
        where = self.folder or f"the tokenizer {self.request.tokenizer!r}"
        return (
            f"{what} needs a chat template, and {where} has none; expected {FILE}, or chat_template in "
            "tokenizer_config.json: take the tokenizer of a checkpoint that chats, or put its template there"
        )


def place(path: str, number: int) -> str:
    """Row `number` of a file, as readers of files call it."""
    suffix = kind(Path(path))
    lines = suffix not in COLUMNS and suffix != ".json"
    return f"{path}, {'line' if lines else 'row'} {number}"


def looks_like_chat(request: Request) -> bool:
    """Do the first row's keys say conversations, and nothing of the field that text would be in? Reads one row."""
    files = find(request.data).files
    if not files or kind(files[0]) not in (*ROWS, *COLUMNS):
        return False
    first = next((row.record for row in reading(files[0], None) if row.record is not None), None)
    return first is not None and request.field not in first and format_of(first) not in (None, "text")


def _folder(tokenizer: str) -> Path | None:
    if tokenizer == "byte":
        return None
    path = Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent


def _hold_out(texts: Iterator[tuple[int, str]], fraction: float) -> Split:
    """About `fraction` of the characters: whole examples in the order of their digests, at least one of each side, and
    of few long examples among short ones not most of the short ones."""
    if not 0 < fraction <= 0.5:
        raise UsageError(f"validation_fraction: got {fraction}; expected more than 0 and at most 0.5")
    sizes: dict[int, int] = {}
    count = 0
    for _, text in texts:
        key, count = digest(text), count + 1
        sizes[key] = sizes.get(key, 0) + len(text)
    if len(sizes) < 2:
        raise UsageError("the data has one example only; expected some to train on and one to hold out (--validation)")
    total, held, taken = sum(sizes.values()), set[int](), 0
    small = [key for key in sorted(sizes) if sizes[key] <= max(fraction, LARGEST) * total]
    for key in small or sorted(sizes)[:1]:
        if held and (taken + sizes[key] > fraction * total or len(held) >= 2 * max(fraction, LARGEST) * len(sizes)):
            break
        held.add(key)
        taken += sizes[key]
    note = f"{len(held):,} of {count:,} examples, {taken / total:.2%} of the characters, chosen by a hash of their text"
    return Split(frozenset(held), note=note)
