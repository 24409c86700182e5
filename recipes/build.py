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
from engine.data.tokenizer import load_tokenizer
from engine.loop.trainer import Trainer
from engine.step.segments import cut
from engine.step.step import Step
from engine.task import Task
from models.llama import PRESETS, Llama
from optimizers.contract import Optimizer, Params, State
from optimizers.partition import freeze
from optimizers.random import Key, fold

from . import init
from .config import Setup, TrainConfig


class Run(NamedTuple):
    """What a config trains. Model and `params` are on the meta device until `place`."""

    config: TrainConfig
    model: Llama
    params: Params
    optimizer: Optimizer
    notes: list[str]  # what a user should know of the optimizer
    key: Key  # of every draw of the optimizer
    epoch: int

    def place(self, device: torch.device | str, fill: bool = True) -> Params:
        """Give the model memory on `device`, one tensor at a time in its final dtype; returns its parameters.

        They are drawn, or read from the folder that --init names. Without `fill` they hold nothing yet: for a
        checkpoint's weights, or on fake tensors. Raises UsageError where the folder has changed.
        """
        self.model.allocate(device)
        named = dict(self.model.named_parameters())
        params: Params = {name: named[name] for name in self.params}
        if fill and self.config.init is not None:
            init.fill(self.config.init, self.model, params)
        elif fill:
            self.model.init_weights(self.config.seed)
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
        model = Llama(config.shape(vocabulary))
    model.to(weights_dtype(config))
    params: Params = dict(model.named_parameters())
    freeze(params, config.freeze)
    key = fold(config.seed, "optimizer")
    setup = Setup(model, params, epoch, key)
    optimizer = config.optimizer_for(setup)
    return Run(config, model, params, optimizer, config.notes(setup, optimizer), key, epoch)


def vocabulary_of(config: TrainConfig) -> int:
    """That of the tokenizer, or without one of the preset. Raises UsageError where it cannot be read."""
    if config.init is not None and init.bare(config.init):
        return init.shape(config.init, 0, "").vocab_size
    byte = config.tokenizer == "byte"
    return PRESETS[config.model].vocab_size if byte else load_tokenizer(config.tokenizer, config.eos).vocab_size
