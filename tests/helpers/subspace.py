"""Models in a random subspace, and training steps with them."""

import torch
from torch import Tensor, nn

from engine.step.segments import cut
from engine.step.step import Step
from helpers.models import batches
from models.layers import attach
from models.llama import Llama
from optimizers.contract import Group, Optimizer, Rule
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.wrappers.rso import rso

RANK, PERIOD, LR, DECAY = 4, 3, 1e-2, 0.1
KINDS = ("gaussian", "haar", "coordinate")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]


def dense(model: nn.Module, rule: Rule | None = None, rest: Rule | None = None, decay: float = DECAY) -> Optimizer:
    params = dict(model.named_parameters())
    return partition(
        params,
        [Group("rso", rule or adamw(), (r"_proj\.weight$",), LR, decay), Group("rest", rest or adamw(), ("",), LR)],
    )


def make(
    model: Llama,
    form="merged",
    rank=RANK,
    period=PERIOD,
    rule=None,
    rest=None,
    decay=DECAY,
    key=1,
    options=None,
    **step,
) -> Step:
    """A step under RSO. Few logits at once, as in the dense tests."""
    params, names, base = dict(model.named_parameters()), matrices(model), dense(model, rule, rest, decay)
    optimizer = rso(base, params, names, rank, period, Key(key), form=form, **(options or {}))
    attach(model, names, rank, form)
    step = dict(mode="off", logits=97 * 8) | step
    return Step(cut(model), params, optimizer, optimizer.init(params), **step)


def hypers(optimizer: Optimizer, lr: float = LR) -> dict[str, dict[str, Tensor]]:
    """What the trainer gives to every group."""
    groups = {group.name: group for group in optimizer.owner.values()}
    return {
        name: {"lr": torch.tensor(lr), "weight_decay": torch.tensor(group.weight_decay)}
        for name, group in groups.items()
    }


def run(step: Step, steps: int = 7, first: int = 0) -> list[float]:
    losses = []
    for i in range(first, first + steps):
        step.switch(i)
        losses.append(step(batches(i), hypers(step.optimizer), i).loss.item())
    return losses


def full(step: Step) -> dict[str, Tensor]:
    """The weights with whatever stands beside them."""
    return step.optimizer.merge(dict(step.params), step.state)
