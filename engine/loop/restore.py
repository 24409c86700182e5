"""Continuing from a checkpoint: its weights, optimizer state and position in the data are put into a step."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.contract import Optimizer, Params, Slots, State, UsageError
from optimizers.convert import Row, convert
from optimizers.state import parked_by, with_status

from .. import checkpoint
from ..checkpoint import CheckpointError, Reader
from ..checkpoint.tensorfile import ties
from ..config import RunConfig
from ..step.step import Step
from ..task import Task
from .position import read_ahead, read_on, saved_order

UNSAID = ("resume", "out", "reorder")  # settings of one command, not of the run


class Progress(NamedTuple):
    """What a checkpoint's trainer.json says of the run."""

    position: int
    units: int  # of the task's, trained on
    offset: int
    order: dict[str, Any]  # what its position means, see `position.read_on`
    rates: dict[str, float]  # the learning rates that the next step would have had, by group
    previous_norm: float
    swapped: int | None  # the step at which another optimizer took over, if one did
    config: dict[str, Any]


class Restored(NamedTuple):
    """What a run that goes on from a checkpoint has to know of it."""

    step: int
    position: int
    offset: int  # units that the position counts more than were trained on
    reads_on: str  # what has to be said of the position
    rates: dict[str, float]  # that the next step would have had, by group
    swapped: int | None
    converted: list[Row]  # what became of another optimizer's state
    changed: list[str]  # settings that differ


@torch.no_grad()
def restore(
    step: Step,
    saved: Reader,
    config: RunConfig,
    task: Task,
    source: Optimizer | None = None,
) -> Restored:
    """Put weights and state of `saved` into `step`, which trains `task`, a tensor at a time.

    What `step.state` holds before is let go, and may be without memory. Given `source`, the optimizer that it was
    trained with, its state is converted; of the old one, one tensor's slots exist at a time. Raises CheckpointError,
    having changed nothing, if it cannot fit.
    """
    progress = _progress(saved, task.unit)
    was = progress.config
    start = read_on(saved.path, task, progress.order, progress.position, config.reorder, source is not None)
    ahead = _read_ahead(saved, was, config, step.optimizer, source)
    if progress.order == saved_order(task) and progress.units != task.units(progress.position) - progress.offset:
        raise CheckpointError(
            f"{saved.path / checkpoint.TRAINER}: edited, position {progress.position} is not {progress.units} "
            f"{task.unit}; take another checkpoint"
        )
    if source is None and was.get("freeze", []) != list(config.freeze):
        raise CheckpointError(
            f"{saved.path}: was trained with --freeze {was.get('freeze', [])}, got {list(config.freeze)}; resume "
            "with what it was trained with, or give what is frozen no more a fresh state with --swap"
        )
    weights = {**step.params, **step.buffers}
    _check_model(saved, task.model_config())  # the causes first: what follows from them is harder to read
    _check_weights(saved, weights)
    _check_state(saved, source or step.optimizer, step.params)
    for name, p in weights.items():
        if name in saved.params.names:
            p.detach().copy_(saved.trained(name))
    step.state.clear()
    converted: list[Row] = []
    if source is None:
        step.state.update(_state(saved, step.optimizer, step.params, step.device))
    else:
        held = SavedState(saved, step.device)
        for name, p in step.params.items():
            merged = source.merge({name: p}, {name: held[name]} if name in held else {})[name]
            if merged is not p:
                p.copy_(merged)
        state, converted = convert(step.params, held, source, step.optimizer, saved.step, step.key)
        step.state.update(state)
    step.missing.look(step.state)
    step.previous = torch.tensor(progress.previous_norm, device=step.device)
    now = config.plain()
    changed = list(_changed(was, {k: value for k, value in now.items() if k not in UNSAID}))
    swapped = saved.step if source is not None else progress.swapped
    offset = task.units(start.position) - progress.units
    reads_on = "; ".join(filter(None, (start.said, ahead)))
    return Restored(saved.step, start.position, offset, reads_on, progress.rates, swapped, converted, changed)


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is set to something else than it was; of settings in a setting, such as an optimizer's options, each."""
    for name, value in now.items():
        if name not in was or was[name] == value:
            continue
        before = was[name]
        if isinstance(value, dict) and isinstance(before, dict) and value.keys() == before.keys():
            yield from _changed(before, value)
        else:
            yield f"{name} {before} -> {value}"


def _read_ahead(
    saved: Reader, was: Mapping[str, Any], config: RunConfig, optimizer: Optimizer, source: Optimizer | None
) -> str:
    """What has to be said where an optimizer orders the batches of a cycle and the run stands inside of one. Raises
    CheckpointError where rows would be read twice, and nothing allows it."""
    before, now = (read_ahead(of.batch, saved.step) for of in (source or optimizer, optimizer))
    sizes = [was["micro_batch"] * was["accumulation"], config.micro_batch * config.accumulation]
    if before == now and (not now or sizes[0] == sizes[1]):
        return ""
    rows = max(len(before), len(now)) * max(sizes)
    said = f"up to {rows} rows of the cycle in hand, whose batches come in a joint order, are read twice"
    if source is not None or config.reorder:
        return f"{said}, and as many not at all"
    raise CheckpointError(
        f"{saved.path}: {said} if a step takes {sizes[1]} rows, was {sizes[0]}. Resume with the --micro-batch and "
        "--accumulation that it was trained with, or give --reorder to go on all the same"
    )


class SavedState(Mapping[str, Slots]):
    """The state of a checkpoint, of which each owner's slots are read when they are asked for, onto `device`: on the
    CPU they are those of the file, mapped, which takes no memory but must not outlive it."""

    def __init__(self, saved: Reader, device: torch.device) -> None:
        self.saved, self.device = saved, device

    def __getitem__(self, owner: str) -> Slots:
        slots = self.saved.slots(owner)
        return with_status(parked_by(slots), {slot: t.to(self.device) for slot, t in slots.items()})

    def __contains__(self, owner: object) -> bool:
        return owner in self.saved.owners

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved.owners)

    def __len__(self) -> int:
        return len(self.saved.owners)


def _state(saved: Reader, optimizer: Optimizer, params: Params, where: torch.device) -> State:
    """The state of a checkpoint where an optimizer keeps it; slots that two tensors share stay one."""
    placed: dict[str, Tensor] = {}
    state: State = {}
    for owner, slots in saved.owners.items():
        by, trained = saved.parked.get(owner, {}), params[owner].device if owner in params else where
        hosted = {slot.name for slot in optimizer.declared(owner) if slot.host or any(by.values())}
        state[owner] = with_status(by, {})
        for slot, key in slots.items():
            device = torch.device("cpu") if slot in hosted else trained
            stored = saved.state.names[key]
            if stored not in placed:
                t = saved.state.read(stored)
                pinned = device.type == "cpu" and trained.type == "cuda"
                made = torch.empty(t.shape, dtype=t.dtype, device=device, pin_memory=pinned)
                placed[stored] = made.copy_(t)
            state[owner][slot] = placed[stored]
    return state


def _check_state(saved: Reader, optimizer: Optimizer, params: Params) -> None:
    """Raises CheckpointError where the checkpoint's state is not what `optimizer` has at its step."""
    for key, mine in optimizer.metadata.items():
        if (got := saved.header.get(key)) != mine:
            raise CheckpointError(
                f"{saved.path}: {key} of its optimizer is {str(got)[:200]}, expected {mine[:200]}; resume with the "
                "settings and the seed that it was trained with, or convert it with --swap"
            )
    shared = {}  # what masks have seen decides what has state
    for key, slots in optimizer.init({}, saved.step).items():
        forms = {slot: saved.state.form(where) for slot, where in saved.owners.get(key, {}).items()}
        if forms == {slot: (tuple(t.shape), t.dtype) for slot, t in slots.items()}:
            shared[key] = saved.slots(key)
    meta = {n: torch.empty_like(p, device="meta") for n, p in params.items()}
    try:
        expected = optimizer.init(meta, saved.step, shared)
    except UsageError as error:
        raise CheckpointError(
            f"{saved.path}: the settings that it says it was trained with do not fit its model: {error}"
        ) from None
    for name in {**expected, **saved.owners}:
        wanted = {slot: (tuple(t.shape), t.dtype) for slot, t in expected.get(name, {}).items()}
        other = {slot: saved.state.form(key) for slot, key in saved.owners.get(name, {}).items()}
        if wanted != other or (name in expected) != (name in saved.owners):
            raise CheckpointError(
                f"{saved.path}: optimizer state of {name} is {other or 'not there'}, expected {wanted or 'none'}; "
                "resume with the optimizer, its settings, seed and precision that it was trained with, or convert it "
                "with --swap"
            )
        parks, theirs = dict(parked_by(expected.get(name, {}))), dict(saved.parked.get(name, {}))
        if parks != theirs:
            raise CheckpointError(
                f"{saved.path}: optimizer state of {name} is parked by masks {list(theirs) or 'none'}, expected "
                f"{list(parks) or 'none'} (of masks over masks, the innermost is 1); resume with the masks and the "
                "--state-policy that it was trained with, or convert it with --swap"
            )


def _check_weights(saved: Reader, params: Params) -> None:
    """Raises CheckpointError where the checkpoint's weights are not those of the model, tied ones named once or more
    on either side."""
    mine, theirs = ties(params), saved.params.names
    there, here = {mine[n] for n in mine if n in theirs}, {theirs[n] for n in theirs if n in mine}
    missing, unexpected = [n for n in mine if mine[n] not in there], [n for n in theirs if theirs[n] not in here]
    if missing or unexpected:
        raise CheckpointError(
            f"{saved.path}: names differ: the checkpoint lacks {missing[:8] or 'nothing'} and has unexpected "
            f"{unexpected[:8] or 'nothing'}; build the model with the checkpoint's config.json"
        )
    for name, p in params.items():
        if name not in theirs:
            continue
        file = saved.weights if saved.weights and name in saved.weights.names else saved.params
        (shape, dtype), expected = file.form(name), (tuple(p.shape), p.dtype)
        if (shape, dtype) != expected:
            like = (
                "build the model like it" if shape != expected[0] else "resume with the --precision it was trained in"
            )
            raise CheckpointError(
                f"{saved.path}: {name}: the checkpoint has {shape} {dtype}, expected {expected[0]} {expected[1]}; "
                f"{like}"
            )
        first = next(n for n in mine if mine[n] == mine[name] and n in theirs)
        if theirs[name] != theirs[first] and not saved.params.read(name).equal(saved.params.read(first)):
            raise CheckpointError(
                f"{saved.path}: {name}: tied to {first} in the model, but the checkpoint has different values"
            )


def _check_model(saved: Reader, model_config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint is of another model whose weights have the same shapes."""
    model, mine = saved.model_config, json.loads(json.dumps(model_config))
    if odd := [k for k in {**mine, **model} if k not in mine or k not in model or mine[k] != model[k]]:
        name = odd[0]
        raise CheckpointError(
            f"{saved.path / checkpoint.CONFIG}: another model: {name} is {model.get(name)!r}, expected "
            f"{mine.get(name)!r}; resume with the model that it was trained with"
        )


def _progress(saved: Reader, unit: str) -> Progress:
    """Raises CheckpointError where trainer.json does not say it, or contradicts itself."""
    swapped, units = saved.trainer.get("swapped"), saved.trainer.get(unit)
    match saved.trainer:
        case {
            "position": int(position),
            "offset": int(offset),
            "data": dict(order),
            "rates": dict(rates),
            "previous_norm": float(norm) | int(norm),
            "config": {"micro_batch": int(micro), "accumulation": int(accumulation)} as config,
        } if (
            bool not in map(type, (position, offset, norm, swapped, micro, accumulation))
            and type(units) is int
            and position >= 0
            and units >= 0
            and all(type(rate) in (float, int) for rate in rates.values())
            and 0 <= norm < math.inf
            and (swapped is None or (isinstance(swapped, int) and 0 <= swapped <= saved.step))
        ):
            return Progress(position, units, offset, order, rates, float(norm), swapped, config)
    got = {k: saved.trainer.get(k) for k in ("position", unit, "previous_norm", "swapped", "data", "config")}
    raise CheckpointError(
        f"{saved.path / checkpoint.TRAINER}: is of no training run of this version, or edited: expected a position, "
        f"{unit}, the order of the data, learning rates, a finite norm, the step of a swap or null, a config "
        "with micro_batch and accumulation, "
        f"got {str(got)[:200]}"
    )
