"""Training steps of small models beside the same training in plain PyTorch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.step.segments import cut
from engine.step.step import Step
from helpers.models import LR, VOCABULARY, batches, rate
from optimizers.contract import Group, Params, State
from optimizers.partition import partition
from optimizers.rules.adamw import adamw
from optimizers.wrappers.wrapper import Wrapper

STEPS, DECAY = 10, 0.1
EPS = 1e-4  # well above rounding noise in gradients, which Adam would otherwise blow up to full-sized steps


class Run(NamedTuple):
    params: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


def hypers(step: int, lr: float | None = None, decay: float = DECAY) -> dict[str, dict[str, Tensor]]:
    return {"all": {"lr": torch.tensor(rate(step) if lr is None else lr), "weight_decay": torch.tensor(decay)}}


def make(model: nn.Module, rule=None, loss=None, frozen: tuple[str, ...] = (), **options) -> Step:
    """A step in which one rule owns everything and `frozen` does not move. Few logits at once: several slices."""
    params = dict(model.named_parameters())
    optimizer = partition(params, [Group("all", rule or adamw(eps=EPS), ("",), LR, DECAY)])
    if frozen:
        optimizer = Still(optimizer, optimizer.owner, optimizer.metadata, frozen)
    options = dict(mode="off", logits=VOCABULARY * 8) | options
    return Step(cut(model, loss), params, optimizer, optimizer.init(params), **options)


@dataclass(frozen=True, eq=False)
class Still(Wrapper):
    """An optimizer that keeps the state of what it does not move."""

    frozen: tuple[str, ...]

    def split(self, params: Params, state: State) -> tuple[Params, Params]:
        moving = [n for n in params if n not in self.frozen]
        return {n: params[n] for n in moving}, {n: p for n, p in params.items() if n not in moving}


def run(step: Step, accumulation: int = 1, decay: float = DECAY, first: int = 0) -> Run:
    losses, norms = [], []
    for i in range(first, STEPS):
        result = step(batches(i, accumulation), hypers(i, decay=decay), i)
        losses.append(result.loss.item())
        norms.append(result.norm.item())
    return Run({name: p.detach().clone() for name, p in step.params.items()}, losses, norms)
