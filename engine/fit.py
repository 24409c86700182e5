"""Train somebody's own module, loss and data: `fit(task, optimizer, RunConfig(...))`."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from optimizers.compile import can_compile
from optimizers.contract import Kind, Optimizer, UsageError
from optimizers.partition import freeze, trainable
from optimizers.random import fold

from .arithmetic import arithmetic
from .atomic import write_whole
from .checkpoint import Reader
from .config import RunConfig, step_options, weights_dtype
from .inspection.receipt import receipt
from .loop.folder import device_of, leave_branch, place
from .loop.metrics import Metrics
from .loop.result import write_result
from .loop.trainer import Trainer
from .step.step import Step
from .task import Task
from .terminal.attempt import attempt


class Fit(NamedTuple):
    """A finished run."""

    out: Path
    steps: int
    metrics: dict[str, float]  # of the evaluation after the last step
    checkpoint: Path | None


def fit(task: Task, optimizer: Optimizer, config: RunConfig | None = None, console: Console | None = None) -> Fit:
    """Train `task.model` in place with `optimizer`, which owns every one of its parameters by name.

    Checkpoints, metrics.jsonl, TensorBoard events and result.json lie in `config.out`. With `resume="auto"` a run that
    was stopped, however, goes on from its newest checkpoint and ends with the weights of one that was not; the model
    that is passed is then overwritten. Works in any thread; signals are heard in the main one. Raises UsageError,
    CheckpointError, WriteError, NonFiniteError, and Interrupted where a signal ended the run after saving.

        params = dict(model.named_parameters())
        optimizer = partition(params, [Group("adamw", adamw(), ("",), lr=1e-3)])
        fit(ArrayTask(model, loss, train=..., validation=...), optimizer, RunConfig(out=Path("runs/mine"), steps=300))
    """
    config = config or RunConfig()
    config.check()
    with arithmetic(config):
        return _run(task, optimizer, config, console or plain_console())


def _run(task: Task, optimizer: Optimizer, config: RunConfig, console: Console) -> Fit:
    """`fit`, where the process computes as `config` says."""
    device = device_of(config.device)
    if config.compile != "off" and (reason := can_compile(device)):
        console.print(f"{reason}: running uncompiled, which is slower")
        config = replace(config, compile="off")
    with place(config, Path("runs") / type(task.model).__name__.lower(), console.print) as (out, saved):
        config = replace(config, out=out, check_memory=False)  # there is no prediction to compare with
        return _fit(task, _step(task, optimizer, config, device, saved is None), config, saved, console)


def _fit(task: Task, step: Step, config: RunConfig, saved: Reader | None, console: Console) -> Fit:
    """In a folder that is this process's own, from the checkpoint `saved`, if any."""
    assert config.out is not None
    out = config.out
    console.print(receipt(step.optimizer, step.params, step.state))
    trainer = Trainer(config, step, task, out)
    if saved:
        resume(trainer, saved, console)
    leave_branch(out, saved, trainer.done, config, console.print)
    write_whole(out / "config.json", json.dumps(config.plain(), indent=1) + "\n")
    with Metrics(out, trainer.done, config.steps, console) as metrics:
        found = trainer.train(metrics)
    kept = trainer.saved or (saved.path if saved else None)
    console.print(f"{attempt(lambda: task.shown(found), 'shown')}\ncheckpoint   {kept}")
    console.print(f"numbers      {attempt(lambda: str(write_result(trainer, metrics, found)), 'written')}")
    return Fit(out, trainer.done, found, kept)


def resume(trainer: Trainer, saved: Reader, console: Console, source: Optimizer | None = None) -> None:
    """Continue from a checkpoint, of the optimizer `source` if that is another, and say what differs. Raises
    CheckpointError."""
    changed = trainer.resume(saved, source)
    differs = f"; changed: {', '.join(changed)}" if changed else ""
    console.print(f"resuming {saved.path} at step {trainer.done}{differs}")
    if source is None and trainer.done == trainer.config.steps:
        console.print(f"nothing is left to train: all {trainer.done} steps are done; give more --steps to go on")
    for note in trainer.notes:
        console.print(note)


def plain_console() -> Console:
    """A console on which nothing that is printed is taken for markup: paths, patterns and samples."""
    watched = sys.stdout.isatty()
    return Console(soft_wrap=not watched, width=None if watched else 160, markup=False, emoji=False, highlight=False)


def _step(task: Task, optimizer: Optimizer, config: RunConfig, device: torch.device, fresh: bool) -> Step:
    """The step that trains the task's model, which is moved to the device in its dtype. Raises UsageError.

    Its state has no memory where that of a checkpoint follows.
    """
    model = task.model.to(device)
    if weights_dtype(config) != torch.float32:
        model = model.to(weights_dtype(config))
    params: dict[str, Tensor] = dict(model.named_parameters())
    freeze(params, config.freeze)
    trained = trainable(params)
    if trained.keys() != optimizer.owner.keys():
        odd = sorted(trained.keys() ^ optimizer.owner.keys())
        raise UsageError(
            f"optimizer: owns {len(optimizer.owner)} parameters, expected the {len(trained)} of the model that "
            f"train; they differ in {odd[:3]}: make it from dict(model.named_parameters()), with the same ones frozen"
        )
    state = optimizer.init(params if fresh else {n: torch.empty_like(p, device="meta") for n, p in params.items()})
    if config.precision == "bf16+8" and not any(group.rule.names(Kind.BITS) for group in optimizer.owner.values()):
        raise UsageError(
            "precision bf16+8: no rule of the optimizer keeps last bits; make its groups with storage.keep"
        )
    key = fold(config.seed, "optimizer")
    return Step(task.segments(), params, optimizer, state, key=key, **step_options(config, device.type))
