"""The index of a prepared folder, which makes it one.

A prepared folder holds `index.json` and, for each split, its tokens as one sequence cut into files: little-endian
unsigned integers, every document followed by the tokenizer's `eos`.
"""

import json
from pathlib import Path
from typing import Any

from optimizers.contract import UsageError

from ..terminal.command import another, pasted
from .tokenizer import Tokenizer, load_tokenizer

SCHEMA = 1
INDEX = "index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a prepared folder. Raises UsageError where there is none, or one this version cannot read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        schema = index["schema"]
    except (FileNotFoundError, NotADirectoryError):
        command = pasted(*another("tools.prepare"), folder)
        raise UsageError(f"{folder}: no {INDEX}: not prepared, or not to the end; run {command}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / INDEX}: damaged ({error!r}); delete the folder and prepare it again") from None
    if schema != SCHEMA:
        raise UsageError(f"{folder / INDEX}: got schema {schema}, expected {SCHEMA}; prepare the data again")
    return dict(index)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer a prepared folder was made with, which lies in it."""
    made = read_index(folder)["tokenizer"]
    tokenizer = load_tokenizer("byte" if made["spec"] == "byte" else str(folder / made["spec"]), made["eos"])
    if tokenizer.fingerprint != made["fingerprint"]:
        raise UsageError(
            f"{folder}: got tokenizer {tokenizer.fingerprint}, expected {made['fingerprint']}; prepare the data again"
        )
    return tokenizer
