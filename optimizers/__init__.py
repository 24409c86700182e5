"""Optimizers as pure functions over named tensors. `contract` says what a rule and an optimizer are.

Every rule is a `torch.optim.Optimizer` by its name: `from optimizers import SUMO` (see `torch_optim`). `Masks` are
OMGD's and LISA's masks for them, `Subspaces` RSO's random subspaces, `InBackward` their update in backward.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What one gives to a rule's class, or the class, imported when it is asked for."""
    if name in ("Masks", "Subspaces"):
        return getattr(import_module(f".wrappers.{name.lower()}", __name__), name)
    if name == "InBackward":
        return import_module(".in_backward", __name__).InBackward
    if name[:1].isupper():
        return getattr(import_module(".torch_optim", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
