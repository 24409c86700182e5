"""From one optimizer to another in the middle of a run: what the first one learned, converted for the second."""

import contextlib
import io
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.checkpoint import Checkpoint
from engine.config import flags
from models.llama import Llama
from optimizers.contract import Optimizer, UsageError
from optimizers.convert import Row
from optimizers.partition import freeze
from optimizers.random import fold

from .config import Setup, TrainConfig, trained_by, unknown


def source(saved: Checkpoint, setup: Setup) -> Optimizer:
    """The optimizer that a checkpoint was trained with, on a model without memory. Raises CheckpointError."""
    config = trained_by(saved)
    with torch.device("meta"):
        model = Llama(setup.model.config)
    freeze(dict(model.named_parameters()), config.freeze)
    own = setup._replace(model=model, params=dict(model.named_parameters()), key=fold(config.seed, "optimizer"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # recipes say things
        try:
            return config.optimizer_for(own)
        except UsageError as error:
            raise unknown(saved, error) from None


def report(rows: Sequence[Row]) -> Table:
    """What became of the state, a row per kind of fate; shares and ratios are [least, most] over its tensors."""
    table = Table(title="optimizer state converted", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("from -> to", no_wrap=True)
    table.add_column("what became of it")
    for column in ("tensors", "first moment kept", "second moment kept", "update RMS, new/old"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind in dict.fromkeys((row.source, row.target, row.did) for row in rows):
        own = [row for row in rows if (row.source, row.target, row.did) == kind]
        spans = (_span([getattr(row, field) for row in own]) for field in ("first_kept", "second_kept", "jump"))
        table.add_row(f"{kind[0]} -> {kind[1]}", kind[2], str(len(own)), *spans)
    return table


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As JSON can hold it; what there is nothing to compare with is null."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row._asdict().items()}
        for row in rows
    ]


def _span(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def go_on(config: TrainConfig, path: Path) -> NoReturn:
    """Become the recipe of `--swap-at`, from the checkpoint at `path`, in the same folder. Raises UsageError."""
    assert config.swap_at is not None
    recipe, *own = shlex.split(config.swap_at[1]) or [""]
    if not recipe.isidentifier():
        raise UsageError(f"--swap-at: got {config.swap_at[1]!r}, expected a recipe and its flags; saved: {path}")
    ends = ["--compile", config.compile, "--out", str(path.parent), "--resume", str(path), "--swap", "convert"]
    given = {name: value for name, value in config.plain().items() if name not in ("swap", "swap_at")}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"recipes.{recipe}", *own, *flags(given), *ends])
