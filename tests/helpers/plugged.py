"""A model whose gradients are given, so that two ways to train it can be compared to the bit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.step.segments import cut
from engine.step.step import Step
from optimizers.contract import Group, idle
from optimizers.partition import partition
from optimizers.random import fold
from optimizers.registry import RULES, rule
from optimizers.rule_optimizer import RuleOptimizer
from optimizers.storage.stored import stored
from optimizers.torch_optim import optimizer

RANK, GAP, STEPS, LR, DECAY = 2, 3, 12, 0.05, 0.1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q_proj, self.up_proj = nn.Linear(6, 6, bias=False), nn.Linear(6, 8)


class Toy(nn.Module):
    """Embedding, blocks, head; the gradient of a parameter is what the batch holds under its name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(6, 7, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p.float() * batch[name]).sum() for name, p in self.named_parameters()]).sum()


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Those of a step; one matrix has none that says anything until step 5, so that its basis comes late."""
    draw = torch.Generator().manual_seed(step)
    made = {name: torch.randn(p.shape, generator=draw) for name, p in model.named_parameters()}
    if step < 5:  # neither then nor a step later is it due
        made["layers.1.q_proj.weight"].zero_()
    return made


def rate(step: int) -> float:
    return LR * (1 - step / (2 * STEPS))


def options(name: str) -> dict[str, Any]:
    """A rank and a gap that fit the toy, where the rule has them."""
    known = {field.name for field in dataclasses.fields(RULES[name].options)} - idle(RULES[name].default())
    return {key: value for key, value in (("rank", RANK), ("update_proj_gap", GAP)) if key in known}


def engine(model: nn.Module, name: str, wrap: Any = None, kept: Sequence[Any] = (), **given: Any) -> Step:
    """The engine's step, its groups written by hand; `kept` is what slots are kept in."""
    params = dict(model.named_parameters())
    alone = rule(name, **options(name)).elementwise
    own, rest = stored(rule(name, **options(name)), *kept), stored(rule("adamw"), *kept)
    groups = [
        Group("own", own, (r"_proj\.weight$",), LR, DECAY),
        Group("norms", rest, ("norm", "bias$"), LR),
        Group("rest", rest, ("",), LR, DECAY),
    ]
    made = partition(params, [Group("own", own, ("",), LR, DECAY)] if alone else groups)
    made = wrap(made, params, fold(0, "optimizer")) if wrap else made
    loss = lambda model, batch: (model(batch), torch.ones((), dtype=torch.int64))  # noqa: E731
    return Step(cut(model, loss), params, made, made.init(params), mode="off", key=fold(0, "optimizer"), **given)


def engine_step(step: Step, model: nn.Module, i: int) -> None:
    hypers = {}
    for group in step.optimizer.owner.values():
        hypers[group.name] = {"lr": torch.tensor(rate(i)), "weight_decay": torch.tensor(group.weight_decay)}
    step.switch(i)
    step([gradients(model, i)], hypers, i)


def facade(model: nn.Module, name: str, **given: Any) -> RuleOptimizer:
    """The same as a torch.optim.Optimizer."""
    return optimizer(name)(model.named_parameters(), LR, DECAY, **options(name), **given)


def facade_step(opt: torch.optim.Optimizer, model: nn.Module, i: int) -> None:
    for group in opt.param_groups:
        group["lr"] = rate(i)
    opt.zero_grad()
    model(gradients(model, i)).backward()
    opt.step()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


def same_state(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(same(slots, b[name]) for name, slots in a.items())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
