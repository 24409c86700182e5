"""Which files paths, folders and patterns stand for, and which they pass over: every one of those is named."""

import glob
import importlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from optimizers.contract import UsageError

from . import compressed

WHOLE = (".txt", ".text", ".md", ".rst", ".tex", ".py")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COLUMNS = (".parquet", ".arrow")
READ = WHOLE + ROWS + COLUMNS
ACCEPTED = f"{' '.join(READ)}, each also {' '.join(compressed.SUFFIXES)}"

# What lies beside text to describe it, or to describe a model: read when it is named, not when its folder is.
_ABOUT = {"dataset_info", "dataset_infos", "dataset_dict", "state", "config", "generation_config", "tokenizer"}
_ABOUT |= {"tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "encoder", "merges"}
_ABOUT |= {"readme", "license", "licence", "copying", "notice", "changelog", "contributing", "citation", "authors"}


class Found(NamedTuple):
    files: list[Path]
    """What is to be read: paths in the order given, each sorted inside."""
    skipped: list[str]
    """One line for each folder or pattern in which something is passed over: what, how often, why."""


def find(paths: Sequence[str | Path], output: Path | None = None) -> Found:
    """The files that `paths` (files, folders, glob patterns) stand for.

    A folder stands for every file below it that `documents` can read, linked folders included; what is hidden,
    describes the data, or was written by this program (`output` above all) is passed over. Raises UsageError for a
    path that stands for nothing, a file of another kind, a file named twice, and one that needs a missing package.
    """
    files: list[Path] = []
    skipped: list[str] = []
    for path in paths:
        search = _Search(Path(path).expanduser(), output)
        files += search.files
        skipped += search.in_words()
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise UsageError(f"{file}: named twice; name every file once, by itself or by one folder or pattern")
        seen.add(real)
        _can_read(file)
    return Found(files, skipped)


def kind(path: Path) -> str:
    """`.jsonl` for `a.jsonl` and for `a.jsonl.xz`; where the kind is not read, all suffixes, or "" for none."""
    name = path.name.lower()
    inner = next((name.removesuffix(suffix) for suffix in compressed.SUFFIXES if name.endswith(suffix)), name)
    found = Path(inner).suffix
    return found if found in READ else found + name[len(inner) :]


class _Search:
    """What one path stands for: `files`, and how often what was passed over."""

    def __init__(self, path: Path, output: Path | None) -> None:
        self.path, self.output = path, os.path.realpath(output) if output else ""
        self.passed: Counter[str] = Counter()
        self.seen: set[str] = set()
        if os.path.isfile(path):
            if kind(path) not in READ:
                raise UsageError(f"{path}: not a kind of file that can be read; expected {ACCEPTED}")
            self.files = [path]
        elif os.path.isdir(path):
            if why := _written(set(os.listdir(path))):
                raise UsageError(f"{path}: {why}, not text; give a prepared folder alone, or name the text itself")
            self.files = list(self._below(path, (os.path.realpath(path),)))
            self._expect_some("nothing to read in this folder")
        elif glob.has_magic(str(path)):
            self.files = list(self._matching())
            self._expect_some(
                "this pattern matches no file that can be read; check it, and that the shell leaves it alone"
            )
        elif os.path.lexists(path):
            why = "a link to nothing" if path.is_symlink() and not path.exists() else "neither a file nor a folder"
            raise UsageError(f"{path}: {why}; expected a file, a folder or a glob pattern")
        else:
            raise UsageError(f"{path}: no such file or folder; expected a file, a folder or a glob pattern")

    def in_words(self) -> list[str]:
        if not self.passed:
            return []
        parts = [f"{count:,} {what}" for what, count in self.passed.most_common(12)]
        more = f", and {len(self.passed) - 12} more kinds" if len(self.passed) > 12 else ""
        return [f"{self.path}: passed over {', '.join(parts)}{more}"]

    def _expect_some(self, lack: str) -> None:
        if not self.files:
            raise UsageError(
                "; ".join([f"{self.path}: {lack}; expected files that end in {ACCEPTED}", *self.in_words()])
            )

    def _matching(self) -> Iterator[Path]:
        """The matches of a pattern; a folder among them is looked into, unless `**` has done so."""
        for match in sorted(Path(match) for match in glob.glob(str(self.path), recursive=True)):
            if not match.is_dir():
                yield from self._file(match)
            elif "**" not in self.path.parts:
                yield from self._folder(match, ())

    def _below(self, folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            raise UsageError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
        for path in (folder / name for name in names):
            if path.name.startswith("."):
                self.passed["hidden"] += 1
            elif path.is_dir():
                yield from self._folder(path, above)
            elif path.stem.split(".")[0].lower() in _ABOUT and kind(path) in READ:
                self.passed["that describe data or a model, such as README and config.json"] += 1
            else:
                yield from self._file(path)

    def _folder(self, path: Path, above: tuple[str, ...]) -> Iterator[Path]:
        real = os.path.realpath(path)
        if real == self.output:
            self.passed["folder that is being written"] += 1
        elif real in above:
            self.passed[f"link back to a folder that it is in ({path.name})"] += 1
        elif why := _written(set(os.listdir(path))):
            self.passed[why] += 1
        else:
            yield from self._below(path, (*above, real))

    def _file(self, path: Path) -> Iterator[Path]:
        real, suffixes = os.path.realpath(path), kind(path)
        if not os.path.exists(path):
            self.passed[f"link to nothing ({path.name})"] += 1
        elif not os.path.isfile(path):
            self.passed["neither file nor folder"] += 1
        elif suffixes not in READ:
            self.passed[f"of a kind that is not read ({suffixes or 'no suffix'})"] += 1
        elif real in self.seen:
            self.passed["file that is there already, through a link"] += 1
        else:
            self.seen.add(real)
            yield path


def _written(names: set[str]) -> str:
    """Was a folder with these entries written by this program? What it is then, else ""."""
    if names & {"index.json", "progress.json"} and any(name.endswith(".bin") for name in names):
        return "folder of prepared tokens"
    if "metrics.jsonl" in names or any(name.startswith("step-") and name[5:].isdecimal() for name in names):
        return "folder of a run"
    return "folder of a comparison of runs" if {"cells.json", "table.md"} <= names else ""


def _can_read(file: Path) -> None:
    """Raises UsageError where a package that reading needs is missing: before anything has been read."""
    if file.suffix.lower() == ".zst":
        compressed.zstandard(file)
    if kind(file) in COLUMNS:
        pyarrow(file)


def pyarrow(file: Path) -> None:
    """Raises UsageError where there is no pyarrow, or not all of it."""
    try:
        for module in ("pyarrow.parquet", "pyarrow.ipc"):
            importlib.import_module(module)
    except ImportError:
        what = kind(file).removeprefix(".")
        raise UsageError(f"{file}: {what} needs pyarrow, which is missing: pip install 'leanstep[data]'") from None
