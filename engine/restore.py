"""Going on from a checkpoint: weights, optimizer state and place in the data, put where a step trains them."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.contract import Optimizer, Params, State
from optimizers.convert import Row, convert

from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .config import RunConfig
from .position import read_on, saved_order
from .step import Step
from .task import Task

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
    saved: Checkpoint,
    config: RunConfig,
    task: Task,
    source: Optimizer | None = None,
) -> Restored:
    """Put weights and state of `saved` into `step`, which trains `task`.

    Given `source`, the optimizer that it was trained with, its state is converted. Raises CheckpointError, having
    changed nothing, if it cannot fit.
    """
    progress = _progress(saved, task.unit)
    was = progress.config
    start = read_on(saved.path, task, progress.order, progress.position, config.reorder, source is not None)
    if progress.order == saved_order(task) and progress.units != task.units(progress.position) - progress.offset:
        raise CheckpointError(
            f"{saved.path / checkpoint.TRAINER}: edited, position {progress.position} is not {progress.units} "
            f"{task.unit}; take another checkpoint"
        )
    if source is None and list(was.get("freeze", ())) != list(config.freeze):
        raise CheckpointError(
            f"{saved.path}: was trained with --freeze {list(was.get('freeze', ()))}, got {list(config.freeze)}; resume "
            "with what it was trained with, or give what is frozen no more a fresh state with --swap"
        )
    expected = _expected(saved, source or step.optimizer, step.params)
    weights = {**step.params, **step.buffers}
    _check_model(saved, weights, task.model_config())
    checkpoint.restore_into(weights, saved.params)
    copies: dict[int, Tensor] = {}  # slots that two tensors share stay one
    state: State = {}
    converted: list[Row] = []
    for name, slots in saved.state.items():
        for slot, t in slots.items():  # on the host where the optimizer keeps them there
            copies.setdefault(id(t), t.to(expected[name][slot].device, copy=True))
        state[name] = {slot: copies[id(t)] for slot, t in slots.items()}
    if source is not None:
        for name, p in source.merge(step.params, state).items():
            if p is not step.params[name]:
                step.params[name].copy_(p)
        state, converted = convert(step.params, state, source, step.optimizer, saved.step, step.key)
    step.state.clear()
    step.state.update(state)
    step.previous = torch.tensor(progress.previous_norm, device=step.device)
    now = config.plain()
    changed = [f"{k} {was[k]} -> {now[k]}" for k in now if k in was and was[k] != now[k] and k not in UNSAID]
    swapped = saved.step if source is not None else progress.swapped
    offset = task.units(start.position) - progress.units
    return Restored(saved.step, start.position, offset, start.said, progress.rates, swapped, converted, changed)


def _expected(saved: Checkpoint, optimizer: Optimizer, params: Params) -> State:
    """What the state of `optimizer` looks like at the checkpoint's step. Raises CheckpointError where it does not."""
    for key, mine in optimizer.about.items():
        if (theirs := saved.header.get(key)) != mine:
            raise CheckpointError(
                f"{saved.path}: {key} of its optimizer is {str(theirs)[:200]}, expected {mine[:200]}; resume with the "
                "settings and the seed that it was trained with, or convert it with --swap"
            )
    expected = optimizer.init(params, saved.step)
    for name in {**expected, **saved.state}:
        wanted, other = (
            {slot: (tuple(t.shape), t.dtype) for slot, t in state.get(name, {}).items()}
            for state in (expected, saved.state)
        )
        if wanted != other or (name in expected) != (name in saved.state):
            raise CheckpointError(
                f"{saved.path}: optimizer state of {name} is {other or 'not there'}, expected {wanted or 'none'}; "
                "resume with the optimizer, its settings, seed and precision that it was trained with, or convert it "
                "with --swap"
            )
    return expected


def _check_model(saved: Checkpoint, params: Params, model_config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint holds another model's weights."""
    try:
        checkpoint.check_fit(params, saved.params)
    except CheckpointError as error:
        raise CheckpointError(f"{saved.path}: {error}") from None
    model, mine = saved.model_config, json.loads(json.dumps(model_config))
    if odd := [k for k in {**mine, **model} if k not in mine or k not in model or mine[k] != model[k]]:
        name = odd[0]
        raise CheckpointError(
            f"{saved.path / checkpoint.CONFIG}: another model: {name} is {model.get(name)!r}, expected "
            f"{mine.get(name)!r}; resume with the model that it was trained with"
        )


def _progress(saved: Checkpoint, unit: str) -> Progress:
    """Raises CheckpointError where trainer.json does not say it, or contradicts itself."""
    swapped, units = saved.trainer.get("swapped"), saved.trainer.get(unit)
    match saved.trainer:
        case {
            "position": int(position),
            "offset": int(offset),
            "data": dict(order),
            "rates": dict(rates),
            "previous_norm": float(norm) | int(norm),
            "config": dict(config),
        } if (
            bool not in map(type, (position, offset, norm, swapped))
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
        f"{unit}, the order of the data, learning rates, a finite norm, the step of a swap or null, a config, "
        f"got {str(got)[:200]}"
    )
