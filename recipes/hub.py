"""A model by its name on the Hugging Face Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct.

The folder is that of huggingface_hub's cache, where transformers finds it too. What a plan needs is fetched first; the
weights, when a run begins.
"""

import re
from pathlib import Path
from typing import Any

from models import weights
from optimizers.contract import UsageError

SMALL = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.*")
WEIGHTS = "*.safetensors"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def folder(model: Path) -> Path:
    """The folder of a model that is named as the Hub names models, without its weights unless they are there already;
    any other path as it is. Raises UsageError where it cannot be fetched."""
    name = model.as_posix()
    if model.exists() or not _NAME.fullmatch(name):
        return model
    return Path(_fetched(name, allow_patterns=[*SMALL]))


def name_of(model: Path) -> str:
    """A folder's name, or that on the Hub of a folder that `folder` gave, without its owner's."""
    found = _cached(model)
    return found[2] if found else model.resolve().name


def complete(model: Path, begun: bool = False) -> None:
    """Fetch the weights of a folder that `folder` gave, where they are not there yet; with `begun`, only where some of
    them are, as after an interruption. Raises UsageError."""
    found = _cached(model)
    if not found or (begun and not any(model.glob(WEIGHTS))):
        return
    try:
        weights.tensors_of(model)
    except ValueError:  # some or all of them are not there
        _fetched(f"{found[1]}/{found[2]}", allow_patterns=[*SMALL, WEIGHTS], revision=model.name)


def _cached(model: Path) -> re.Match[str] | None:
    """Owner and name of a model in the Hub's cache."""
    return _CACHED.fullmatch(model.parent.parent.name) if model.parent.name == "snapshots" else None


def _fetched(name: str, **asked: Any) -> str:
    by_hand = f"fetch it by hand, and give that folder: hf download {name} --local-dir {name.partition('/')[2]}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"MODEL {name}: is no folder, and to fetch it takes the extra hf (pip install 'leanstep[hf]'); or {by_hand}"
        ) from None
    try:
        return str(snapshot_download(name, **asked))
    except Exception as error:  # of the network, of the Hub, of the disk: whatever its version raises
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"MODEL {name}: is no folder, and could not be fetched ({why}); {by_hand}") from None
