"""Matrices that rules are tried on, and what a trainer gives to a rule."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def decaying(m: int, n: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall like i^-power."""
    u, _, vh = torch.linalg.svd(randn(m, n, seed=seed), full_matrices=False)
    return u @ torch.diag(torch.arange(1, min(m, n) + 1) ** -power) @ vh


# subsets ------------------------------------------------------------------------------------------------------------


shapes = st.lists(st.integers(1, 12), max_size=4).map(tuple)
