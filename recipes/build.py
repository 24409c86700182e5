"""The one builder: a config becomes a run. train, plan, inspect --fresh, compare and swap all build here.

run = build(config, vocabulary, epoch)            everything but memory: model and parameters on the meta device
state = run.optimizer.init(run.params)            what the state looks like, without memory too
params = run.place(device)                        the weights, in the dtype that they are trained in
step = run.step(params, state)                    the training step
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.config import step_options, weights_dtype
from engine.loop.trainer import Trainer
from engine.step.segments import cut
from engine.step.step import Step
from engine.task import Task
from optimizers.contract import Optimizer, Params, State
from optimizers.partition import freeze
from optimizers.random import Key, fold

from .config import Setup, TrainConfig


class Run(NamedTuple):
    """What a config trains. Model and `params` are on the meta device until `place`."""

    config: TrainConfig
    model: Any
    params: Params
    optimizer: Optimizer
    notes: list[str]  # what a user should know of the optimizer
    key: Key  # of every draw of the optimizer
    epoch: int
    vocabulary: int

    def place(self, device: torch.device | str, fill: bool = True) -> Params:
        """Give the model memory on `device`, one tensor at a time in its final dtype; returns its parameters.

        They are drawn, or read from the folder that --init names. Without `fill` they hold nothing yet: for a
        checkpoint's weights, or on fake tensors. Raises UsageError where the folder has changed.
        """
        self.model.allocate(device)
        named = dict(self.model.named_parameters())
        params: Params = {name: named[name] for name in self.params}
        if fill:
            self.config.fill(self.model, params)
        return params

    def step(self, params: Params, state: State, **changed: Any) -> Step:
        """The step that trains `params` with `state`, both moved in place; `changed` are options of `Step`."""
        options = step_options(self.config, next(iter(params.values())).device.type)
        return Step(cut(self.model), params, self.optimizer, state, key=self.key, **{**options, **changed})

    def trainer(self, task: Task, out: Path, device: torch.device, fresh: bool = True) -> Trainer:
        """The loop over `task`, with fresh weights and state; or, not `fresh`, with none yet: a checkpoint's follow,
        and never exist beside others."""
        params = self.place(device, fill=fresh)
        state = self.optimizer.init(params if fresh else self.params)
        return Trainer(replace(self.config, out=out), self.step(params, state), task, out)


def build(config: TrainConfig, vocabulary: int, epoch: int = 1000) -> Run:
    """Model and optimizer of `config`, without memory. `epoch`: steps in a pass over the data, which matters to what
    changes with it. Raises UsageError where settings do not go together."""
    with torch.device("meta"):
        model = config.network(vocabulary)
    model.to(weights_dtype(config))
    params: Params = dict(model.named_parameters())
    freeze(params, config.freeze)
    key = fold(config.seed, "optimizer")
    setup = Setup(model, params, epoch, key)
    optimizer = config.optimizer_for(setup)
    return Run(config, model, params, optimizer, config.notes(setup, optimizer), key, epoch, vocabulary)
