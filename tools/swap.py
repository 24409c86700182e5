"""Another optimizer for a checkpoint: its state converted, tensor by tensor, with a report.

    python -m tools.swap runs/adamw/step-00001000 runs/snsm --to "snsm demo --rank 48"
    python -m recipes.snsm demo --rank 48 --out runs/snsm --resume auto                     then train on

SRC is a run or a step folder; DST gets one checkpoint of the same step, weights and position in the data. What follows
--to is a recipe and its flags: any rule, rank, subset, mask or subspace that can be trained can be swapped to. Data,
length, model and the rest of the bookkeeping are SRC's. Weights that an optimizer keeps in two parts are merged.

Exit codes: 0 done, 1 failure, 2 bad arguments, 5 a checkpoint that cannot be used.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.command import typed
from engine.config import flags
from engine.output import printable
from optimizers.contract import UsageError


@dataclass(frozen=True)
class Swap:
    source: tyro.conf.Positional[Path]
    """A run or a step folder."""
    out: tyro.conf.Positional[Path]
    """Folder for the new run."""
    to: str
    """A recipe and its flags, such as "snsm demo --rank 48"."""


def swap(config: Swap) -> int:
    """Run the recipe as a process that converts, saves and stops; returns its exit code. Raises UsageError,
    CheckpointError."""
    path: Path | None = config.source
    if not os.path.exists(config.source / checkpoint.TRAINER):
        path = checkpoint.latest(config.source).path
        if path is None:
            raise CheckpointError(f"{config.source}: no whole checkpoint in it; give a run or a step folder")
    assert path is not None
    if checkpoint.latest(config.out).path:
        raise UsageError(f"{config.out} holds a run already; give another folder")
    recipe, *own = shlex.split(config.to) or [""]
    if not recipe.isidentifier():
        raise UsageError(f"--to: got {config.to!r}, expected a recipe and its flags, such as 'snsm demo --rank 48'")
    was = checkpoint.verify(path).get("config")
    if not isinstance(was, dict) or "recipe" not in was:
        raise CheckpointError(f"{path}: does not say by which recipe it was trained; resume it once with its own")
    ends = ["--compile", "off", "--out", str(config.out), "--resume", str(path), "--swap", "only"]
    command = [sys.executable, "-m", f"recipes.{recipe}", *own, *flags(was), *ends]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    printable()
    try:
        raise SystemExit(swap(tyro.cli(Swap, prog=typed(), description=__doc__)))
    except UsageError as error:
        code, line = 2, f"error: {error}"
    except CheckpointError as error:
        code, line = 5, f"error: {error}"
    print(line, file=sys.stderr)
    raise SystemExit(code)
