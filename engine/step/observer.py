"""Callbacks that a step makes as it runs, for the planner, a profiler or NVTX ranges. By default they do nothing."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

NOTHING: AbstractContextManager[None] = nullcontext()


class Observer:
    """Told of everything that a `Step` does, in order, on the host."""

    def doing(self, moment: str, part: str) -> AbstractContextManager[None]:
        """Entered around one thing: "forward of block 3", "backward of block 3", "head", "refresh", "update".

        `part` is the first word. Moments may lie in each other: those of the head's forward and backward lie in "head".
        """
        return NOTHING

    def made(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """What became of tensors just made: "residual stream" or "gradients"."""
