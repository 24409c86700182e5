"""Whose state a checkpoint holds, and what of it is parked: what the head of its optimizer's file says of that."""

import json
from collections.abc import Mapping

from optimizers.contract import State
from optimizers.state import parked_by

from .tensorfile import CheckpointError, TensorFile

OLD = "parked:"  # before the names of parked tensors, up to version 1.0
Status = Mapping[int, bool]  # see `optimizers.state.Parked`


def write_status(state: State) -> dict[str, str]:
    """For the head: "owners", whose state it is, in order; and "parked", what has parked which of them, if any."""
    parked = {owner: dict(by) for owner, slots in state.items() if (by := parked_by(slots))}
    return {"owners": json.dumps(list(state))} | ({"parked": json.dumps(parked)} if parked else {})


def read_status(state: TensorFile) -> tuple[dict[str, dict[str, str]], dict[str, Status]]:
    """Of each owner, in order, its slots and the keys that they have in the file; and what is parked by what.

    Raises CheckpointError where the head is damaged.
    """
    listed = state.json("owners", list)
    if not all(isinstance(owner, str) for owner in listed) or len(set(listed)) < len(listed):
        raise CheckpointError(f'{state.file}: damaged, "owners" in its head must be names, each once')
    owners: dict[str, dict[str, str]] = {owner.removeprefix(OLD): {} for owner in listed}  # be it without slots
    host = state.head.get("state_policy") == "offload"
    parked: dict[str, Status] = {owner.removeprefix(OLD): {1: host} for owner in listed if owner.startswith(OLD)}
    for owner, by in (state.json("parked", dict) if "parked" in state.head else {}).items():
        if owner not in owners or not _is_status(by):
            raise CheckpointError(f'{state.file}: damaged, "parked" in its head says {by!r} of {owner!r}')
        parked[owner] = {int(depth): at for depth, at in by.items()}
    for key in state.names:
        owner, slash, slot = key.partition("/")
        if not slash or owner not in listed:
            raise CheckpointError(f"{state.file}: damaged, {key!r} is not <owner>/<slot> of an owner in its head")
        owners[owner.removeprefix(OLD)][slot] = key
    return owners, parked


def _is_status(by: object) -> bool:
    return isinstance(by, dict) and bool(by) and all(k.isdecimal() and type(v) is bool for k, v in by.items())
