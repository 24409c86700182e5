"""Writing checkpoints under a folder, whole or not at all, and deleting those that are no longer to be kept."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optimizers.contract import Params, State, UsageError
from optimizers.state import parked_by, with_status

from . import tensorfile
from .form import (
    CONFIG,
    DATA,
    MODEL,
    OPTIMIZER,
    RESERVED,
    SCHEMA,
    STEP,
    TRAINER,
    WEIGHTS,
    digest,
    read_json,
    seal,
    steps,
    write_json,
)
from .process import this
from .status import write_status
from .tensorfile import HEAD, CheckpointError, WriteError, ties

WRITING = re.compile(r"\.tmp-step-\d{8,}-(\d+)-(\d*)")  # a checkpoint half written, by which process


def save(
    root: Path,
    step: int,
    params: Params,
    state: State,
    trainer: Mapping[str, Any],
    model_config: Mapping[str, Any],
    header: Mapping[str, str] | None = None,
    merge: Callable[[Params, State], Params] | None = None,
) -> Path:
    """Write `<root>/step-<step>` atomically, replacing it if it is there; returns the folder.

    `trainer` is any JSON: seed, data cursor, resolved recipe under "config". `header` (optimizer's name, period,
    position, ...) goes into the head of optimizer.safetensors, where tools can read it without loading a tensor.
    `merge` is the optimizer's: what it changes is not yet the model's. model.safetensors then holds what it gives, and
    weights.safetensors those parameters as they are trained. Raises CheckpointError where something cannot be saved
    exactly, WriteError where the disk does not take it, both times leaving the root as it was.
    """
    if step < 0 or trainer.get("step", step) != step:
        raise CheckpointError(f"step must be at least 0 and agree with trainer's, got {step}, {trainer.get('step')}")
    if taken := [key for key in trainer if key in RESERVED] + [key for key in header or {} if key in HEAD]:
        raise CheckpointError(f"keys {taken} are written by save itself; call yours something else")
    final, old = (root / f"{prefix}step-{step:08d}" for prefix in ("", ".old-"))
    fresh = root / f".tmp-{final.name}-{this().pid}-{this().started}"
    try:
        try:
            _recover(root)
            fresh.mkdir(parents=True)
            made, apart = _merged(params, state, merge)
            tensorfile.write(fresh / MODEL, params, {}, made)
            if apart:
                tensorfile.write(fresh / WEIGHTS, {name: params[name] for name in apart}, {})
            tensorfile.write(fresh / OPTIMIZER, flatten(state), {**(header or {}), **write_status(state)})
            write_json(fresh / CONFIG, model_config)
            data = (*DATA, WEIGHTS) if apart else DATA
            files = {name: {"bytes": (fresh / name).stat().st_size, "sha256": digest(fresh / name)} for name in data}
            schema = SCHEMA if apart else 1
            write_json(fresh / TRAINER, {"schema": schema, "step": step, **trainer, "files": files})
            record = read_json(fresh / TRAINER)
            write_json(fresh / TRAINER, {**record, "sha256": seal(record)})
            for name in (*data, TRAINER, "."):
                _fsync(fresh / name)
            if final.exists():
                final.rename(old)  # a kill between these two renames leaves `old`, which `latest` knows
            fresh.rename(final)
            _fsync(root)
        finally:
            _recover(root)
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}; make room there"
        raise WriteError(f"{error.filename or fresh}: {why}") from error
    return final


def _merged(
    params: Params, state: State, merge: Callable[[Params, State], Params] | None
) -> tuple[Callable[[str], Tensor] | None, list[str]]:
    """What makes a parameter the model's, one at a time, and the names of those that it changes."""
    if merge is None:
        return None, []
    meta = {name: p.to("meta") for name, p in params.items()}
    slots = {
        name: with_status(parked_by(own), {s: t.to("meta") for s, t in own.items()}) for name, own in state.items()
    }
    after = merge(meta, slots)
    apart = [name for name, p in meta.items() if after[name] is not p]
    tied = ties(params)
    changed = {tied[name]: name for name in apart}

    def made(name: str) -> Tensor:
        if (own := changed.get(tied[name])) is None:
            return params[name]
        return merge({own: params[own]}, {own: state[own]} if own in state else {})[own]

    return made, [name for name in params if tied[name] in changed]


def prune(
    root: Path, keep_last: int, keep_every: int = 0, upto: int | None = None, spared: int | None = None
) -> list[Path]:
    """Delete all but the `keep_last` newest checkpoints, whole or not; returns the folders that are gone.

    Those of a step that is a multiple of `keep_every` stay, unless that is 0, and that of step `spared`. Checkpoints of
    steps after `upto`, which a run left behind that went on from an earlier one, are neither deleted nor counted.
    """
    if keep_last < 1:
        raise UsageError(f"keep_last must be at least 1, got {keep_last}; to keep every checkpoint, do not prune")
    there = {path: int(match[1]) for path in steps(root) if (match := STEP.fullmatch(path.name))}
    old = [path for path, step in there.items() if upto is None or step <= upto][:-keep_last]
    old = [path for path in old if there[path] != spared]
    gone = [path for path in old if not keep_every or there[path] % keep_every]
    for path in gone:
        hidden = path.rename(root / f".tmp-{path.name}")  # half-deleted must not look like a checkpoint
        shutil.rmtree(hidden)
    return gone


def _recover(root: Path) -> None:
    """Tidy after a save, also a killed one: put back what was set aside and not replaced, delete the rest."""
    for old in root.glob(".old-step-*"):
        if (final := root / old.name.removeprefix(".old-")).exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    me = this()
    for fresh in root.glob(".tmp-*step-*"):
        writer = WRITING.fullmatch(fresh.name)
        if writer and int(writer[1]) != me.pid and me._replace(pid=int(writer[1]), started=writer[2]).lives:
            continue  # another process is writing it, without owning the folder: its own affair
        shutil.rmtree(fresh)


def flatten(state: State) -> dict[str, Tensor]:
    """The state under `<param>/<slot>`. Raises CheckpointError for a name with a slash in it."""
    for owner in state:
        if "/" in owner:
            raise CheckpointError(f"state of {owner!r}: a parameter's name must not contain '/'; rename the module")
    return {f"{owner}/{slot}": tensor for owner, slots in state.items() for slot, tensor in slots.items()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
