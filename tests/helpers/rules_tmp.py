"""x"""

import torch
from torch import Tensor

from optimizers.contract import Slots


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def copied(slots: Slots) -> Slots:
    return {k: v.clone() for k, v in slots.items()}


def same(a: Slots, b: Slots) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
