"""A checkpoint on the disk: found, verified, and read whole or one tensor at a time."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from optimizers.contract import Params, Slots, State
from optimizers.state import with_status

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
)
from .status import Status, read_status
from .tensorfile import HEAD, CheckpointError, TensorFile


class Checkpoint(NamedTuple):
    """One checkpoint in memory, on the CPU, every dict in the order in which it was saved."""

    step: int
    params: Params  # as they are trained
    state: State
    trainer: dict[str, Any]
    model_config: dict[str, Any]
    path: Path
    header: dict[str, str]


class Reader(NamedTuple):
    """One checkpoint on the disk, every file verified, whose tensors are read one at a time."""

    step: int
    params: TensorFile  # as the model has them
    weights: TensorFile | None  # those that are trained in another form
    state: TensorFile
    owners: dict[str, dict[str, str]]  # whose state it is, in order -> its slots -> their keys in the file
    parked: dict[str, Status]  # those that are frozen -> by what
    trainer: dict[str, Any]
    model_config: dict[str, Any]
    path: Path
    header: dict[str, str]

    def trained(self, name: str) -> Tensor:
        """A parameter as it is trained, on the CPU."""
        return (self.weights if self.weights and name in self.weights.names else self.params).read(name)

    def slots(self, owner: str) -> Slots:
        """The state of one owner, on the CPU."""
        return with_status(self.parked.get(owner, {}), {s: self.state.read(k) for s, k in self.owners[owner].items()})


class Latest(NamedTuple):
    """The newest whole checkpoint, if any, and the newer ones that were passed over: (folder, why)."""

    path: Path | None
    damaged: list[tuple[Path, str]]
    record: dict[str, Any] | None = None  # what `verify` gave of it, so that `read` need not verify it again

    def reader(self) -> Reader | None:
        """The checkpoint, open; its files are not verified again."""
        return None if self.path is None else read(self.path, self.record)


def verify(path: Path) -> dict[str, Any]:
    """Read `path`'s trainer.json and check every file against it; returns trainer.json. Loads no tensor."""
    file = path / TRAINER
    record = read_json(file, "this is no checkpoint of leanstep, or not a whole one")
    schema, files, step = (record.get(key) for key in ("schema", "files", "step"))
    if type(schema) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{file}: foreign, it has no schema and file list; not written by leanstep")
    if schema > SCHEMA:
        raise CheckpointError(f"{file}: has schema {schema}, newer than {SCHEMA}; update leanstep to read it")
    if schema < 1 or record.pop("sha256", None) != seal(record):
        raise CheckpointError(f"{file}: damaged, its content does not match its own checksum")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{file}: damaged, step is {step!r}, expected a whole number of at least 0")
    if (named := STEP.fullmatch(path.name)) and int(named[1]) != step:
        raise CheckpointError(f"{file}: is of step {step}, but lies in {path.name}; give the folder its own name back")
    for name in (*DATA, WEIGHTS) if WEIGHTS in files else DATA:
        match files.get(name):
            case {"bytes": int(size), "sha256": str(digest)}:
                _check(path / name, size, digest)
            case entry:
                raise CheckpointError(f"{file}: damaged, lists {name} as {entry!r}, expected its bytes and sha256")
    return record


def read(path: Path, record: dict[str, Any] | None = None) -> Reader:
    """Verify the checkpoint at `path` and open it. Raises CheckpointError naming the first file that is wrong.

    `record` is what `verify` gave where the caller has just called it: every byte is hashed once.
    """
    record = record or verify(path)
    params, state = TensorFile(path / MODEL), TensorFile(path / OPTIMIZER)
    weights = TensorFile(path / WEIGHTS) if WEIGHTS in record["files"] else None
    if weights and (odd := weights.names.keys() - params.names.keys()):
        raise CheckpointError(f"{weights.file}: damaged, {sorted(odd)[:3]} are not in {MODEL}")
    owners, parked = read_status(state)
    trainer = {key: value for key, value in record.items() if key not in RESERVED}
    header = {key: value for key, value in state.head.items() if key not in HEAD}
    return Reader(
        record["step"], params, weights, state, owners, parked, trainer, read_json(path / CONFIG), path, header
    )


def load(path: Path, record: dict[str, Any] | None = None) -> Checkpoint:
    """Verify the checkpoint at `path`, unless `record` is what `verify` gave, and read it whole. Raises
    CheckpointError naming the first file that is wrong."""
    found = read(path, record)
    flat = found.state.everything()
    state = {
        owner: with_status(found.parked.get(owner, {}), {slot: flat[key] for slot, key in slots.items()})
        for owner, slots in found.owners.items()
    }
    params = found.params.everything() | (found.weights.everything() if found.weights else {})
    return Checkpoint(found.step, params, state, found.trainer, found.model_config, path, found.header)


def latest(root: Path) -> Latest:
    """The newest checkpoint under `root` whose every file verifies, and the damaged ones that are newer than it."""
    damaged = []
    for path in reversed(steps(root)):
        try:
            record = verify(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
        else:
            return Latest(path, damaged, record)
    return Latest(None, damaged)


def _check(file: Path, bytes: int, sha256: str) -> None:
    try:
        if (size := file.stat().st_size) != bytes:
            kind = "truncated" if size < bytes else "too long"
            raise CheckpointError(f"{file}: {kind}, has {size} bytes, expected {bytes}")
        if (got := digest(file)) != sha256:
            raise CheckpointError(f"{file}: damaged, has sha256 {got[:16]}…, expected {sha256[:16]}…")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; {TRAINER} lists it") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
