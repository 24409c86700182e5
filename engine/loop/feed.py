"""Batches on their way to the device. On CUDA a step's batches are read while the step before runs, and copied from
pinned memory, so that neither reading nor copying is waited for; elsewhere they are read when they are needed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..step.segments import Batch
from .evaluation import to_device

Read = Callable[[int, int], Mapping[str, Tensor]]  # (position, rows) -> a batch on the host
BUFFERS = 2  # of each micro-batch: one that is being copied, one that is being filled


class Event(Protocol):
    """When a copy is done."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Slot:
    """Pinned memory of one micro-batch, and the copy that has read it last."""

    def __init__(self, pin: Callable[[Tensor], Tensor], event: Event) -> None:
        self._pin, self._event = pin, event
        self._fields: Batch = {}

    def fill(self, batch: Mapping[str, Tensor]) -> None:
        """Put a batch here, once the copy that reads what was here is done: two steps later it is."""
        self._event.synchronize()
        for name, t in batch.items():
            held = self._fields.get(name)
            if held is None or held.shape != t.shape or held.dtype != t.dtype:
                self._fields[name] = self._pin(t)
            self._fields[name].copy_(t)
        self._fields = {name: self._fields[name] for name in batch}

    def send(self, device: torch.device) -> Batch:
        """The batch on the device; the host goes on at once."""
        sent = to_device(self._fields, device)
        self._event.record()
        return sent


class Feed:
    """The micro-batches of a step, in turn, from `read`, which is a pure function of the position."""

    def __init__(
        self,
        read: Read,
        device: torch.device,
        ahead: bool | None = None,
        pin: Callable[[Tensor], Tensor] = lambda t: torch.empty_like(t, pin_memory=True),
        event: Callable[[], Event] = torch.cuda.Event,
    ) -> None:
        """Reads `ahead` on CUDA unless it is said. What is pinned, and how a copy is noticed, is for tests."""
        self._read, self._device, self._pin, self._event = read, device, pin, event
        self._reads_ahead = device.type == "cuda" if ahead is None else ahead
        self._turns: list[list[Slot]] = [[] for _ in range(BUFFERS)]
        self._turn = 0
        self._waiting: tuple[tuple[int, ...], int] | None = None  # positions that are read, and rows

    def batches(self, positions: Sequence[int], rows: int) -> list[Batch]:
        """Of one step: `rows` rows from each of these positions, on the device."""
        if not self._reads_ahead:
            return [to_device(self._read(position, rows), self._device) for position in positions]
        if self._waiting != (tuple(positions), rows):
            self.read(positions, rows)
        self._waiting = None
        sent = [slot.send(self._device) for slot in self._turns[self._turn][: len(positions)]]
        self._turn = (self._turn + 1) % BUFFERS
        return sent

    def read(self, positions: Sequence[int], rows: int) -> None:
        """Read what the next `batches` will ask for. On the CPU there is nothing to gain, and nothing is done."""
        if not self._reads_ahead:
            return
        slots = self._turns[self._turn]
        slots += [Slot(self._pin, self._event()) for _ in range(len(positions) - len(slots))]
        for slot, position in zip(slots, positions, strict=False):
            slot.fill(self._read(position, rows))
        self._waiting = tuple(positions), rows
