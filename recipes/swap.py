"""From one optimizer to another in the middle of a run: what the first one learned, converted for the second."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from engine.checkpoint import Reader
from engine.tasks.config import LanguageConfig
from engine.terminal.tables import Fitting
from optimizers.contract import Optimizer, UsageError
from optimizers.convert import Row

from .build import Run, build
from .config import TrainConfig
from .registry import parsed, unknown, words


def source(saved: Reader, run: Run, config: TrainConfig) -> Optimizer:
    """The optimizer that a checkpoint of this run's model was trained with, under `config`. Raises CheckpointError."""
    try:
        return build(config, run.vocabulary, run.epoch).optimizer
    except UsageError as error:
        raise unknown(saved.path, error) from None


def report(rows: Sequence[Row]) -> Fitting:
    """What became of the state, a row per kind of fate; shares and ratios are [least, most] over its tensors."""
    figures = ["tensors", "first moment kept", "second moment kept", "update RMS, new/old"]
    found: list[tuple[str, str, list[str]]] = []
    for kind in dict.fromkeys((row.source, row.target, row.did) for row in rows):
        own = [row for row in rows if (row.source, row.target, row.did) == kind]
        spans = (_span([getattr(row, field) for row in own]) for field in ("first_kept", "second_kept", "jump"))
        found.append((f"{kind[0]} -> {kind[1]}", kind[2], [str(len(own)), *spans]))
    return Fitting("optimizer state converted", "from -> to", "what became of it", figures, found)


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """As JSON can hold it; what there is nothing to compare with is null."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row._asdict().items()}
        for row in rows
    ]


def _span(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"{min(known):.2f} to {max(known):.2f}" if known else "-"


def continued(config: TrainConfig, path: Path) -> TrainConfig:
    """The run of `--swap-at`, from the checkpoint at `path`, in the same folder. Raises UsageError."""
    assert config.swap_at is not None
    target = parsed(words(config.swap_at[1], "--swap-at"), "--swap-at")
    return converting(target, config, path, path.parent, "convert")


def converting(
    target: TrainConfig, config: TrainConfig, path: Path, out: Path, swap: Literal["convert", "only"]
) -> TrainConfig:
    """`target`'s optimizer on the data, model, length and bookkeeping of `config`, from its checkpoint at `path`."""
    if config.about != target.about:
        raise UsageError(
            f"recipes.{target.recipe}: trains on something else than recipes.{config.recipe}; name that one, with "
            "another --optimizer"
        )
    names = (*(f.name for f in fields(LanguageConfig)), *config.about)
    shared = {name: getattr(config, name) for name in names}
    placed = {"out": out, "resume": str(path), "swap": swap, "swap_at": None}
    return replace(target, **{**shared, **placed})
