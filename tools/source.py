"""The checkpoint that a tool is to read: the same folders are right or wrong for all of them."""

import sys
from pathlib import Path

from engine.checkpoint import CheckpointError, Latest, latest
from optimizers.contract import UsageError


def newest(path: Path, what: str) -> Latest:
    """The newest whole checkpoint in a run's folder; damaged ones that are passed over are named on stderr.

    Raises UsageError, which calls the argument `what`, where no checkpoint is in the folder, and CheckpointError where
    none of them is whole.
    """
    found = latest(path)
    for folder, why in found.damaged:
        print(f"skipped {folder.name}: {why}", file=sys.stderr)
    if found.damaged and found.path is None:
        raise CheckpointError(f"{path}: none of its {len(found.damaged)} checkpoints is whole")
    if found.path is None:
        missing = "" if path.exists() else ", which is not there"
        raise UsageError(f"{what}: got {str(path)!r}{missing}, expected a folder of step-* checkpoints, or one of them")
    return found
