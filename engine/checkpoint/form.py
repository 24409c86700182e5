"""What the files of a checkpoint are called, and the JSON in them: written, read, sealed."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import naming
from .tensorfile import CheckpointError

MODEL, CONFIG, OPTIMIZER, TRAINER = "model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"
WEIGHTS = "weights.safetensors"  # where some are trained in another form than the model has them
DATA = (MODEL, CONFIG, OPTIMIZER)
SCHEMA = 2  # of trainer.json; 1 where there is no WEIGHTS
RESERVED = ("schema", "files", "sha256")  # keys of trainer.json that are not the caller's
STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


def steps(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; what a killed save had set aside comes before what takes its place.

    Raises CheckpointError where the folder cannot be read.
    """
    try:
        folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror or error}") from None
    found = [(int(match[1]), path.name[0] != ".", path) for path in folders if (match := STEP.fullmatch(path.name))]
    return [path for *_, path in sorted(found)]


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: {error}; give numbers, strings, lists and dicts only") from error
    with naming(file):
        file.write_text(text + "\n", encoding="utf-8")


def read_json(file: Path, otherwise: str = "the checkpoint is not whole") -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{file}: {what}; {otherwise}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged, not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: foreign, holds a {type(content).__name__}, expected an object")
    return content


def seal(record: Mapping[str, Any]) -> str:
    """A checksum of what a JSON file holds, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
