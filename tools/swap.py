"""Another optimizer for a checkpoint: its state converted, tensor by tensor, with a report.

    python -m tools.swap runs/adamw/step-00001000 runs/snsm --to "snsm demo --rank 48"
    python -m recipes.snsm demo --rank 48 --out runs/snsm --resume auto                     then train on

SRC is a run or a step folder; DST gets one checkpoint of the same step, weights and position in the data. What follows
--to is a recipe and its flags: any rule, rank, subset, mask or subspace that can be trained can be swapped to. Data,
length, model and the rest of the bookkeeping are SRC's. Weights that an optimizer keeps in two parts are merged.

Exit codes: 0 done, 1 failure, 2 bad arguments, 5 a checkpoint that cannot be used.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from engine import checkpoint
from engine.checkpoint.form import steps
from engine.terminal.flags import ask
from optimizers.contract import UsageError

from .source import newest


@dataclass(frozen=True)
class Swap:
    source: tyro.conf.Positional[Path]
    """A run or a step folder."""
    out: tyro.conf.Positional[Path]
    """Folder for the new run."""
    to: str
    """A recipe and its flags, such as "snsm demo --rank 48"."""


def swap(config: Swap) -> None:
    """Convert, save and stop. Raises UsageError, CheckpointError."""
    from recipes.registry import parsed, trained_by, words  # slow to import
    from recipes.swap import converting
    from recipes.train import train

    if steps(config.out):
        raise UsageError(f"{config.out} holds a run already; give another folder")
    target = parsed(words(config.to, "--to"), "--to")
    alone = os.path.exists(config.source / checkpoint.TRAINER)
    saved = checkpoint.read(config.source) if alone else newest(config.source, "SOURCE").reader()
    assert saved is not None
    was = replace(trained_by(saved), compile="off")
    train(converting(target, was, saved.path, config.out, "only"), saved)


if __name__ == "__main__":
    from recipes.cli import main

    main(lambda args: ask(lambda prog: tyro.cli(Swap, args=args, description=__doc__, prog=prog)), swap)
