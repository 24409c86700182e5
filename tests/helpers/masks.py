"""Models under masks: the masks of each kind, and training steps with them."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from helpers.models import batches, llama, rate
from models.llama import Llama
from optimizers.contract import Group, Optimizer, Rule, state_bytes
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    Traversal,
    coordinates,
    layers,
    tensors,
    traversal,
)

LR, DECAY, EPS, KEY = 1e-2, 0.1, 1e-4, Key(3)


def everything(params: dict[str, Tensor], rule: Rule) -> Optimizer:
    """One rule for all."""
    return partition(params, [Group("all", rule, ("",), LR, DECAY)])


def hypers(optimizer: Optimizer, step: int, decay: float = DECAY) -> dict[str, dict[str, Tensor]]:
    """What the trainer gives to every group."""
    one = {"lr": torch.tensor(rate(step)), "weight_decay": torch.tensor(decay)}
    return {group.name: one for group in optimizer.owner.values()}


def make(model: Llama, optimizer: Optimizer, **options) -> Step:
    params = dict(model.named_parameters())
    options = dict(mode="off", logits=97 * 8, key=KEY) | options
    return Step(cut(model), params, optimizer, optimizer.init(params), **options)


def run(step: Step, first: int, last: int, accumulation: int = 1, decay: float = DECAY) -> Step:
    for i in range(first, last):
        step.switch(i)
        step(batches(step.optimizer.batch(i), accumulation), hypers(step.optimizer, i, decay), i)
    return step


def named(count: int, size: int = 1) -> dict[str, Tensor]:
    """A model of `count` layers and something outside of them."""
    return {f"layers.{i}.w": torch.zeros(size) for i in range(count)} | {"head": torch.zeros(size)}


# What is frozen stands still (e), what is clipped is clipped first, and accumulation changes nothing (k).


KINDS: dict[str, Callable[[dict[str, Tensor]], Traversal]] = {
    "layers": lambda params: traversal(layers(params), KEY, active=1, period=2),
    "tensors": lambda params: traversal(tensors(params), KEY, keep=0.5, period=2),
    "tensors by size": lambda params: traversal(tensors(params, balance="numel"), KEY, keep=0.3, period=2),
    "coordinates": lambda params: traversal(coordinates(params), KEY, keep=0.3, period=2),
    "lisa": lambda params: traversal(layers(params), KEY, active=1, period=2, replacement=True),
}


# Memory, counted.


SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=64)


def held(step: Step) -> int:
    return sum(map(state_bytes, step.state.values()))


def masked(layers_active: int | None, **options) -> Step:
    """Twelve blocks, all or some of them active at a time."""
    model = llama(12, **SIZES)
    params = dict(model.named_parameters())
    base = everything(params, adamw())
    if layers_active is None:
        return make(model, base, **options)
    return make(model, omgd(base, params, traversal(layers(params), KEY, active=layers_active, period=2)), **options)


def text(count: int, length: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.arange(count * length).view(count, length) % 64
    return [{"input_ids": ids, "targets": ids}]
