"""Going on from a checkpoint: weights, optimizer state and place in the data, put where a step trains them."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimizers.convert import Row, convert
from optimizers.core import Optimizer, Params, State

from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .config import RunConfig
from .step import Step


class Progress(NamedTuple):
    """What a checkpoint's trainer.json says of the run."""

    position: int
    data: str
    previous_norm: float
    swapped: int | None  # the step at which another optimizer took over, if one did
    config: dict[str, Any]


class Restored(NamedTuple):
    """What a run that goes on from a checkpoint has to know of it."""

    step: int
    position: int
    swapped: int | None
    converted: list[Row]  # what became of another optimizer's state
    changed: list[str]  # settings that differ


@torch.no_grad()
def restore(
    step: Step,
    saved: Checkpoint,
    config: RunConfig,
    data: str,
    model_config: Mapping[str, Any],
    source: Optimizer | None = None,
) -> Restored:
    """Put weights and state of `saved` into `step`, which trains on data of this fingerprint.

    Given `source`, the optimizer that it was trained with, its state is converted. Raises CheckpointError, having
    changed nothing, if it cannot fit.
    """
    progress = _progress(saved)
    was = progress.config
    if progress.data != data or was["sequence"] != config.sequence:
        raise CheckpointError(
            f"{saved.path}: was trained on other data or with --sequence {was['sequence']}; its position in the "
            "data means nothing here. Give it the same --data, --tokenizer and --sequence"
        )
    expected = _expected(saved, source or step.optimizer, step.params)
    _check_model(saved, step.params, model_config)
    checkpoint.restore_into(step.params, saved.params)
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
    changed = [f"{k} {was[k]} -> {now[k]}" for k in now if k in was and was[k] != now[k] and k not in ("resume", "out")]
    swapped = saved.step if source is not None else progress.swapped
    return Restored(saved.step, progress.position, swapped, converted, changed)


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


def _progress(saved: Checkpoint) -> Progress:
    """Raises CheckpointError where trainer.json does not say it, or contradicts itself."""
    swapped = saved.trainer.get("swapped")
    match saved.trainer:
        case {
            "position": int(position),
            "tokens": int(tokens),
            "data": str(data),
            "previous_norm": float(norm) | int(norm),
            "config": {"sequence": int(sequence)},
        } if (
            bool not in map(type, (position, tokens, norm, swapped, sequence))
            and position >= 0
            and tokens == position * sequence
            and 0 <= norm < math.inf
            and (swapped is None or (isinstance(swapped, int) and 0 <= swapped <= saved.step))
        ):
            return Progress(position, data, float(norm), swapped, saved.trainer["config"])
    got = {k: saved.trainer.get(k) for k in ("position", "tokens", "previous_norm", "swapped", "data", "config")}
    raise CheckpointError(
        f"{saved.path / checkpoint.TRAINER}: is of no training run, or edited: expected a position, tokens that agree "
        f"with it and config's sequence, a finite norm, the step of a swap or null, the data's fingerprint, "
        f"got {str(got)[:200]}"
    )
