"""The tasks of GLUE (arXiv 1804.07461): where their texts and labels stand, in its tsv files and in those of Hugging
Face's `glue`; which split is which file; what they are judged by.

    files(["glue_data"], GLUE["rte"])        the files of both splits, of a folder that holds RTE/train.tsv, ...
    read(files, ...)                         texts and labels

Any other labelled files are read the same way, with the columns that the caller names.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optimizers.contract import UsageError

from . import compressed
from .files import READ, kind
from .rows import rows


class Columns(NamedTuple):
    """Names of columns: of one text or two, and of the label."""

    texts: tuple[str, ...]
    label: str


class Layout(NamedTuple):
    """A task. Labels are numbered in their order; none: they are numbers themselves."""

    folder: str  # in GLUE's download
    columns: tuple[Columns, ...]  # the first of which a file has all
    labels: tuple[str, ...]
    scores: tuple[str, ...]  # the first is what the papers report
    held_out: str = "dev"
    header: tuple[str, ...] = ()  # of tsv files that have none


PAIR = Columns(("sentence1", "sentence2"), "label")
ENTAILED, TWO = ("entailment", "not_entailment"), ("0", "1")
MNLI = (Columns(("sentence1", "sentence2"), "gold_label"), Columns(("premise", "hypothesis"), "label"))
INFERRED = ("entailment", "neutral", "contradiction")

GLUE: dict[str, Layout] = {
    "cola": Layout(
        "CoLA",
        (Columns(("sentence",), "label"),),
        TWO,
        ("matthews", "accuracy"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Layout("SST-2", (Columns(("sentence",), "label"),), TWO, ("accuracy",)),
    "mrpc": Layout("MRPC", (Columns(("#1 String", "#2 String"), "Quality"), PAIR), TWO, ("f1", "accuracy")),
    "stsb": Layout(
        "STS-B", (Columns(("sentence1", "sentence2"), "score"), PAIR), (), ("pearson", "spearman")
    ),
    "qqp": Layout(
        "QQP",
        (Columns(("question1", "question2"), "is_duplicate"), Columns(("question1", "question2"), "label")),
        TWO,
        ("accuracy", "f1"),
    ),
    "mnli": Layout("MNLI", MNLI, INFERRED, ("accuracy",), "dev_matched"),
    "mnli-mm": Layout("MNLI", MNLI, INFERRED, ("accuracy",), "dev_mismatched"),
    "qnli": Layout("QNLI", (Columns(("question", "sentence"), "label"),), ENTAILED, ("accuracy",)),
    "rte": Layout("RTE", (PAIR,), ENTAILED, ("accuracy",)),
    "wnli": Layout("WNLI", (PAIR,), TWO, ("accuracy",)),
}  # fmt: skip


class Labelled(NamedTuple):
    """The examples of a split: one text or two each; classes as numbers, or numbers."""

    texts: list[tuple[str, ...]]
    targets: list[float]
    malformed: int
    first: str  # what is wrong with the first malformed row, and where


def files(paths: Sequence[str], layout: Layout, train: bool) -> list[Path]:
    """The files of the training split or the held-out one: `paths` themselves where they are files, else those in the
    one folder that are called so. Raises UsageError for a split that is not there."""
    found = [Path(path).expanduser() for path in paths]
    if found and all(path.is_file() for path in found):
        return found
    names = ("train",) if train else (layout.held_out, layout.held_out.replace("dev", "validation"))
    if len(found) != 1 or not found[0].is_dir():
        missing = next((path for path in found if not path.exists()), "no path")
        raise UsageError(f"--data: got {missing}, expected a folder with the splits of a task, or files that exist")
    folder = found[0] / layout.folder if layout.folder and (found[0] / layout.folder).is_dir() else found[0]
    split = [file for file in sorted(folder.iterdir()) if _is(file, names)]
    if not split:
        some = ", ".join(f"{name}.tsv, {name}-*.parquet" for name in names)
        raise UsageError(
            f"{folder}: got no {'training' if train else 'held-out'} split, expected {some} or another of "
            f"{' '.join(READ)}; name the folder of the task, or its files" + ("" if train else " with --validation")
        )
    return split


def _is(file: Path, names: Sequence[str]) -> bool:
    """Is it one of these splits, whole or in parts such as train-00000-of-00002.parquet?"""
    stem = file.name.lower()
    for suffix in (*compressed.SUFFIXES, *READ):
        stem = stem.removesuffix(suffix)
    return file.is_file() and kind(file) in READ and any(stem == name or stem.startswith(f"{name}-") for name in names)


def read(paths: Sequence[Path], layout: Layout, allowed: float = 0.0) -> Labelled:
    """All examples of some files. Raises UsageError for a column that is not there, for a label that is none of the
    layout's, and where more than the share `allowed` of the rows are malformed."""
    found = Labelled([], [], 0, "")
    for path in paths:
        header = layout.header if kind(path) == ".tsv" else ()
        columns: Columns | None = None
        for row in rows(path, None, header):
            place = f"{path}, {row.place}"
            if row.record is None:
                fault = f"{place}: {row.fault or 'holds no columns'}"
                found = found._replace(malformed=found.malformed + 1, first=found.first or fault)
                continue
            columns = _columns(row.record, layout, columns, place if columns else str(path))
            found.texts.append(tuple(_text(row.record, name, place) for name in columns.texts))
            found.targets.append(_target(row.record[columns.label], layout.labels, place, columns.label))
    if not found.texts:
        raise UsageError(f"{paths[0]}: holds no example{': ' + found.first if found.first else ''}; give another file")
    if found.malformed > allowed * (len(found.texts) + found.malformed):
        raise UsageError(
            f"{found.first} ({found.malformed} such rows); allowed are {allowed:.2%}: repair them, or use "
            "--allow-malformed"
        )
    return found


def names_of(paths: Sequence[Path], columns: Columns) -> tuple[str, ...]:
    """The labels of some files, sorted: those of a task that is not in the table. Raises UsageError, for a row without
    one too."""
    found = set[str]()
    for path in paths:
        for row in rows(path, None):
            if row.record is None:
                continue
            if columns.label not in row.record:
                raise _lacking(row.record, (columns,), str(path))
            value = row.record[columns.label]
            if value is None or value != value or not str(value).strip():
                raise UsageError(
                    f"{path}, {row.place}: {columns.label}: got {value!r}, expected a label; fill it in, or remove the "
                    "row"
                )
            found.add(str(value))
    return tuple(sorted(found, key=lambda name: (len(name), name) if name.isdecimal() else (0, name)))


def _columns(record: Mapping[str, Any], layout: Layout, so_far: Columns | None, place: str) -> Columns:
    """The columns of a row, which are those of the rows before it in its file."""
    for columns in layout.columns if so_far is None else (so_far,):
        if all(name in record for name in (*columns.texts, columns.label)):
            return columns
    raise _lacking(record, layout.columns, place)


def _lacking(record: Mapping[str, Any], known: Sequence[Columns], place: str) -> UsageError:
    wanted = next((name for name in (*known[0].texts, known[0].label) if name not in record), known[0].label)
    return UsageError(
        f"{place}: got the columns {', '.join(record)}, expected one named {wanted!r}; name others with --text-fields "
        "and --label-field"
    )


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    if isinstance(value := record[name], str):
        return value
    raise UsageError(f"{place}: {name}: got {str(value)[:60]!r}, expected a text")


def _target(value: Any, labels: tuple[str, ...], place: str, name: str) -> float:
    """A class's number, of its name or number; or the number itself."""
    if not labels:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
        raise UsageError(f"{place}: {name}: got {str(value)[:60]!r}, expected a number")
    if str(value) in labels:
        return labels.index(str(value))
    if type(value) is int and 0 <= value < len(labels):
        return value
    raise UsageError(
        f"{place}: {name}: got {str(value)[:60]!r}, expected one of {', '.join(labels)}: give all of them with --labels"
    )
