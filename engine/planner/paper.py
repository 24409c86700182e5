"""Weights and optimizer state as papers count them: every number in bfloat16, no gradients, no activations."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .plan import Built, _Drawn

NUMBER = 2  # bytes of a bfloat16


class PaperUnits(NamedTuple):
    """Bytes: of the weights, and of what the optimizer holds at the first step."""

    weights: int
    state: int


def paper_units(build: Callable[[], Built]) -> PaperUnits:
    """The estimate of GaLore's tables and of those after it. It is no peak: nothing may be compared with a plan.

    `build` is called under a FakeTensorMode. A number counts two bytes whatever it is kept in, except where that is
    one byte, which then counts as it is. Two names of one tensor count once.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Drawn():  # type: ignore[no-untyped-call]
        built = build()
        state = built.optimizer.init(built.params, 0)
        return PaperUnits(_bytes(built.params.values()), _bytes(t for slots in state.values() for t in slots.values()))


def _bytes(tensors: Iterable[Tensor]) -> int:
    once = {id(t): t for t in tensors}
    return sum(t.numel() * min(t.element_size(), NUMBER) for t in once.values())
