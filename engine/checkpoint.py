"""Checkpoints that are whole or not there.

    <root>/step-00001000/
        model.safetensors      parameters under their full names; tied weights once
        config.json            the model's configuration, in Hugging Face form
        optimizer.safetensors  state, under `<param>/<slot>`
        trainer.json           step and whatever else resumes the run; size and sha256 of the three files above

A folder is written beside its place under a hidden name, fsynced file by file, and renamed into place, so a kill or a
power cut leaves the previous checkpoint as it was. Everything is data: tensors and JSON, never code. One process at a
time writes to a root.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.core import Params, Slots, State, UsageError

from . import tensorfile
from .tensorfile import HEAD, SCHEMA, TensorFile, ties
from .tensorfile import CheckpointError as CheckpointError  # both are this file's to raise
from .tensorfile import WriteError as WriteError

MODEL, CONFIG, OPTIMIZER, TRAINER = "model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"
DATA = (MODEL, CONFIG, OPTIMIZER)
RESERVED = ("schema", "files", "sha256")  # keys of trainer.json that are not the caller's
STEP = re.compile(r"(?:\.old-)?step-(\d{8,})")


class Checkpoint(NamedTuple):
    """One checkpoint in memory, on the CPU, every dict in the order in which it was saved."""

    step: int
    params: Params
    state: State
    trainer: dict[str, Any]
    model_config: dict[str, Any]
    path: Path
    header: dict[str, str]


class Reader(NamedTuple):
    """One checkpoint on the disk, every file verified, whose tensors are read one at a time."""

    step: int
    params: TensorFile
    state: TensorFile
    owners: dict[str, list[str]]  # whose state it is, in order -> its slots
    trainer: dict[str, Any]
    model_config: dict[str, Any]
    path: Path
    header: dict[str, str]

    def slots(self, owner: str) -> Slots:
        """The state of one owner, on the CPU."""
        return {slot: self.state.read(f"{owner}/{slot}") for slot in self.owners[owner]}


class Latest(NamedTuple):
    """The newest whole checkpoint, if any, and the newer ones that were passed over: (folder, why)."""

    path: Path | None
    damaged: list[tuple[Path, str]]


def save(
    root: Path,
    step: int,
    params: Params,
    state: State,
    trainer: Mapping[str, Any],
    model_config: Mapping[str, Any],
    header: Mapping[str, str] | None = None,
) -> Path:
    """Write `<root>/step-<step>` atomically, replacing it if it is there; returns the folder.

    `trainer` is any JSON: seed, data cursor, resolved recipe under "config". `header` (optimizer's name, period,
    position, ...) goes into the head of optimizer.safetensors, where tools can read it without loading a tensor.
    Raises CheckpointError where something cannot be saved exactly, WriteError where the disk does not take it, both
    times leaving the root as it was.
    """
    if step < 0 or trainer.get("step", step) != step:
        raise CheckpointError(f"step must be at least 0 and agree with trainer's, got {step}, {trainer.get('step')}")
    if taken := [key for key in trainer if key in RESERVED] + [key for key in header or {} if key in HEAD]:
        raise CheckpointError(f"keys {taken} are written by save itself; call yours something else")
    final, fresh, old = (root / f"{prefix}step-{step:08d}" for prefix in ("", ".tmp-", ".old-"))
    try:
        try:
            _recover(root)
            fresh.mkdir(parents=True)
            tensorfile.write(fresh / MODEL, params, {})
            tensorfile.write(fresh / OPTIMIZER, _flatten(state), {**(header or {}), "owners": json.dumps(list(state))})
            _write_json(fresh / CONFIG, model_config)
            files = {name: {"bytes": (fresh / name).stat().st_size, "sha256": _digest(fresh / name)} for name in DATA}
            _write_json(fresh / TRAINER, {"schema": SCHEMA, "step": step, **trainer, "files": files})
            record = _read_json(fresh / TRAINER)
            _write_json(fresh / TRAINER, {**record, "sha256": _seal(record)})
            for name in (*DATA, TRAINER, "."):
                _fsync(fresh / name)
            if final.exists():
                final.rename(old)  # a kill between these two renames leaves `old`, which `latest` knows
            fresh.rename(final)
            _fsync(root)
        finally:
            _recover(root)
    except OSError as error:
        raise WriteError(f"{error.filename or fresh}: cannot be written: {error.strerror or error}") from error
    return final


def verify(path: Path) -> dict[str, Any]:
    """Read `path`'s trainer.json and check every file against it; returns trainer.json. Loads no tensor."""
    file = path / TRAINER
    record = _read_json(file, "this is no checkpoint of leanstep, or not a whole one")
    schema, files, step = (record.get(key) for key in ("schema", "files", "step"))
    if type(schema) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{file}: foreign, it has no schema and file list; not written by leanstep")
    if schema > SCHEMA:
        raise CheckpointError(f"{file}: has schema {schema}, newer than {SCHEMA}; update leanstep to read it")
    if schema < 1 or record.pop("sha256", None) != _seal(record):
        raise CheckpointError(f"{file}: damaged, its content does not match its own checksum")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{file}: damaged, step is {step!r}, expected a whole number of at least 0")
    if (named := STEP.fullmatch(path.name)) and int(named[1]) != step:
        raise CheckpointError(f"{file}: is of step {step}, but lies in {path.name}; give the folder its own name back")
    for name in DATA:
        match files.get(name):
            case {"bytes": int(size), "sha256": str(digest)}:
                _check(path / name, size, digest)
            case entry:
                raise CheckpointError(f"{file}: damaged, lists {name} as {entry!r}, expected its bytes and sha256")
    return record


def read(path: Path) -> Reader:
    """Verify the checkpoint at `path` and open it. Raises CheckpointError naming the first file that is wrong."""
    record = verify(path)
    params, state = TensorFile(path / MODEL), TensorFile(path / OPTIMIZER)
    listed = state.json("owners", list)
    if not all(isinstance(owner, str) for owner in listed) or len(set(listed)) < len(listed):
        raise CheckpointError(f'{state.file}: damaged, "owners" in its head must be names, each once')
    owners: dict[str, list[str]] = {owner: [] for owner in listed}  # an owner without slots is an owner still
    for key in state.names:
        owner, slash, slot = key.partition("/")
        if not slash or owner not in owners:
            raise CheckpointError(f"{state.file}: damaged, {key!r} is not <owner>/<slot> of an owner in its head")
        owners[owner].append(slot)
    trainer = {key: value for key, value in record.items() if key not in RESERVED}
    header = {key: value for key, value in state.head.items() if key not in HEAD}
    return Reader(record["step"], params, state, owners, trainer, _read_json(path / CONFIG), path, header)


def load(path: Path) -> Checkpoint:
    """Verify the checkpoint at `path` and read it whole. Raises CheckpointError naming the first file that is wrong."""
    found = read(path)
    flat = found.state.everything()
    state = {owner: {slot: flat[f"{owner}/{slot}"] for slot in slots} for owner, slots in found.owners.items()}
    params = found.params.everything()
    return Checkpoint(found.step, params, state, found.trainer, found.model_config, path, found.header)


def latest(root: Path) -> Latest:
    """The newest checkpoint under `root` whose every file verifies, and the damaged ones that are newer than it."""
    damaged = []
    for path in reversed(_list(root)):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
        else:
            return Latest(path, damaged)
    return Latest(None, damaged)


def restore_into(params: Params, loaded: Params) -> None:
    """Copy `loaded` into `params` in place, after checking that names, shapes and dtypes agree.

    Either side may name a tied weight once or several times. Raises CheckpointError, having copied nothing.
    """
    for name, p in check_fit(params, loaded).items():
        p.detach().copy_(loaded[name])


def check_fit(params: Params, loaded: Params) -> Params:
    """Raises CheckpointError unless `restore_into` can copy; returns those of `params` that it would copy to."""
    missing, unexpected = _unmatched(params, loaded), _unmatched(loaded, params)
    if missing or unexpected:
        raise CheckpointError(
            f"names differ: the checkpoint lacks {_few(missing)} and has unexpected {_few(unexpected)}; "
            "build the model with the checkpoint's config.json"
        )
    common = {name: p for name, p in params.items() if name in loaded}
    for name, p in common.items():
        got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (loaded[name], p))
        if got != expected:
            raise CheckpointError(f"{name}: the checkpoint has {got}, expected {expected}; build the model like it")
    for name, first in ties(common).items():
        if loaded[name] is not loaded[first] and not torch.equal(loaded[name], loaded[first]):
            raise CheckpointError(f"{name}: tied to {first} in the model, but the checkpoint has different values")
    return common


def prune(root: Path, keep_last: int, keep_every: int = 0, upto: int | None = None) -> list[Path]:
    """Delete all but the `keep_last` newest checkpoints, whole or not; returns the folders that are gone.

    Those of a step that is a multiple of `keep_every` stay, unless that is 0. Checkpoints of steps after `upto`, which
    a run left behind that went on from an earlier one, are neither deleted nor counted.
    """
    if keep_last < 1:
        raise UsageError(f"keep_last must be at least 1, got {keep_last}; to keep every checkpoint, do not prune")
    there = {path: int(match[1]) for path in _list(root) if (match := STEP.fullmatch(path.name))}
    old = [path for path, step in there.items() if upto is None or step <= upto][:-keep_last]
    gone = [path for path in old if not keep_every or there[path] % keep_every]
    for path in gone:
        hidden = path.rename(root / f".tmp-{path.name}")  # half-deleted must not look like a checkpoint
        shutil.rmtree(hidden)
    return gone


def _list(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first; what a killed save had set aside comes before what takes its place."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    found = [(int(match[1]), path.name[0] != ".", path) for path in folders if (match := STEP.fullmatch(path.name))]
    return [path for *_, path in sorted(found)]


def _recover(root: Path) -> None:
    """Tidy after a save, also a killed one: put back what was set aside and not replaced, delete the rest."""
    for old in root.glob(".old-step-*"):
        if (final := root / old.name.removeprefix(".old-")).exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    for fresh in root.glob(".tmp-*step-*"):
        shutil.rmtree(fresh)


def _check(file: Path, bytes: int, sha256: str) -> None:
    try:
        if (size := file.stat().st_size) != bytes:
            kind = "truncated" if size < bytes else "too long"
            raise CheckpointError(f"{file}: {kind}, has {size} bytes, expected {bytes}")
        if (digest := _digest(file)) != sha256:
            raise CheckpointError(f"{file}: damaged, has sha256 {digest[:16]}…, expected {sha256[:16]}…")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {TRAINER} lists it") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _flatten(state: State) -> dict[str, Tensor]:
    for owner in state:
        if "/" in owner:
            raise CheckpointError(f"state of {owner!r}: a parameter's name must not contain '/'; rename the module")
    return {f"{owner}/{slot}": tensor for owner, slots in state.items() for slot, tensor in slots.items()}


def _unmatched(wanted: Params, there: Params) -> list[str]:
    """Names in `wanted` that are not in `there`, nor tied to one that is."""
    tied = ties(wanted)
    have = {tied[name] for name in wanted if name in there}
    return [name for name in wanted if tied[name] not in have]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{names[:8]}{more}" if names else "nothing"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=2)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name}: {error}; give numbers, strings, lists and dicts only") from error
    file.write_text(text + "\n", encoding="utf-8")


def _read_json(file: Path, otherwise: str = "the checkpoint is not whole") -> dict[str, Any]:
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


def _seal(record: Mapping[str, Any]) -> str:
    """A checksum of what a JSON file holds, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
