"""The update inside of backward: a layer moves as soon as its gradients are there, and they are freed.

torch_optim.SUMO(model, lr=2e-3, rank=128, in_backward=InBackward(micro_batches=4, clip_norm=1.0))

So gradients of one layer exist at a time in the place of all, in a loop that has one backward pass a step. With several
passes they add up until the last one, in which they are freed layer by layer.
"""

import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import UsageError
from .motion import Layer, Motion

PREVIOUS = "previous_norm"  # in the first group: what the next step clips by


@dataclass(frozen=True)
class InBackward:
    """`micro_batches`: backward passes a step; layers move in the last one. Or leave it at 1, and have all passes but
    the last one in `with opt.accumulating():`. `clip_norm`: gradients are scaled by what the global norm of the step
    before asks for, as the engine's clip "previous" does, since that of this step is not known when the first layer
    moves; None clips nothing."""

    micro_batches: int = 1
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise UsageError(f"micro_batches: got {self.micro_batches}, expected at least 1 backward pass a step")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UsageError(f"clip_norm: got {self.clip_norm}, expected a norm above 0, or None to clip nothing")

    def bound(self, previous: Tensor) -> Tensor | None:
        """What all gradients are multiplied by, 0-d, given the norm of the step before; 0 is that of no step."""
        if self.clip_norm is None:
            return None
        return torch.where(previous > 0, self.clip_norm / (previous + 1e-6), 1.0).clamp(max=1)


class Hooks:
    """Hooks on the parameters of an optimizer, and how far the step is that they have begun."""

    def __init__(self, params: Iterable[Tensor], begin: Callable[[], Motion], micro_batches: int) -> None:
        """`begin` is a method of the optimizer, which begins a step when the first gradient is complete."""
        self.motion: Motion | None = None
        self._begin, self._micro_batches, self._waiting = weakref.WeakMethod(begin), micro_batches, False
        self._passes: Counter[Tensor] = Counter()  # in which a parameter has got a gradient
        self._open: dict[Layer, set[Tensor]] = {}  # whose gradients are not complete
        self._lock = threading.Lock()  # backward has a thread a device
        own = weakref.ref(self)
        self._removers = [_hook(p, own) for p in params]

    def remove(self) -> None:
        """Take the hooks away."""
        for remove in self._removers:
            remove()

    def forget(self) -> None:
        """The gradients so far were thrown away, before anything moved by them."""
        if self.motion is None:
            self._passes.clear()

    def end(self) -> None:
        """The step is done."""
        self.motion = None
        self._passes.clear()

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Gradients that come meanwhile are of a pass that is not the last one."""
        if self._micro_batches > 1:
            raise UsageError(
                f"accumulating: got micro_batches={self._micro_batches} too, by which passes are counted; expected one "
                "of the two: leave micro_batches at 1"
            )
        before, self._waiting = self._waiting, True
        try:
            yield
        finally:
            self._waiting = before

    @torch.no_grad()
    def arrived(self, p: Tensor) -> None:
        """A gradient was added to p's; move its layer, if that was the last one it waits for."""
        self._passes[p] += not self._waiting
        with self._lock:
            if self.motion is None and (self._waiting or self._passes[p] < self._micro_batches):
                return
            motion = self.motion = self.motion or self._started()
        layer = motion.layer_of.get(p)
        if layer not in motion.layers or self._waiting or self._passes[p] > self._micro_batches:
            raise UsageError(
                "in_backward: got one more gradient in a step whose layers have begun to move. Call step() after the "
                "last backward pass of a step; say with micro_batches=... how many it has, or have all but the last "
                "one in `with opt.accumulating():`; checkpoint activations with use_reentrant=False"
            )
        if self._passes[p] == self._micro_batches:
            self._open[layer].discard(p)
            if not self._open[layer]:
                motion.move(layer, free=True)

    def _started(self) -> Motion:
        begin = self._begin()
        assert begin is not None, "hooks without their optimizer do nothing"
        motion = begin()
        self._open = {layer: {one.p for one in own if one.p.requires_grad} for layer, own in motion.layers.items()}
        return motion


def check_alone() -> None:
    """Raises UsageError where several processes share a run: their gradients are averaged after the hooks."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there and (size := torch.distributed.get_world_size()) > 1:
        raise UsageError(
            f"in_backward: got {size} processes, expected one: DDP averages gradients when a layer would have moved by "
            "its own already; leave in_backward out"
        )


def _hook(p: Tensor, own: "weakref.ref[Hooks]") -> Callable[[], None]:
    """A hook that keeps neither the optimizer nor its parameters alive; returns what removes it."""

    def arrived(p: Tensor) -> None:
        if (hooks := own()) is not None:
            hooks.arrived(p)

    wanted = p.requires_grad  # torch takes no hook of what is frozen
    handle = p.requires_grad_(True).register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
    p.requires_grad_(wanted)
    return handle.remove  # type: ignore[no-any-return]
