"""Optimizers as pure functions over named tensors. `contract` says what a rule and an optimizer are.

Every rule is a `torch.optim.Optimizer` by its name: `from optimizers import SUMO` (see `torch_optim`), and `Masks` are
OMGD's and LISA's masks for them.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`Masks`, or the class of a rule, imported when it is asked for."""
    if name == "Masks":
        return import_module(".wrappers.masks", __name__).Masks
    if name[:1].isupper():
        return getattr(import_module(".torch_optim", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
