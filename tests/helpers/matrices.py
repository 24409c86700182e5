"""Matrices that rules are tried on, what a trainer gives to a rule, and some steps of one."""

import torch
from torch import Tensor

from optimizers.apply import move
from optimizers.contract import Rule, Slots
from optimizers.random import Key


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def decaying(*shape: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """Matrices whose singular values fall like i^-power."""
    u, _, vh = torch.linalg.svd(randn(*shape, seed=seed), full_matrices=False)
    return u * torch.arange(1, min(shape[-2:]) + 1) ** -power @ vh


def copied(slots: Slots) -> Slots:
    return {k: v.clone() for k, v in slots.items()}


def same(a: Slots, b: Slots) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(rule: Rule, p: Tensor, steps: int, lr: float = 0.01, slots: Slots | None = None) -> tuple[Tensor, Slots]:
    """Some steps with noisy gradients, refreshes among them."""
    slots = slots or rule.init(p)
    for t in range(steps):
        g = decaying(*p.shape, seed=50 + t)
        if t % rule.gap == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        p, slots, _ = move(rule, g, slots, p, hyper(lr))
    return p, slots
