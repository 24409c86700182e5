"""What an optimizer keeps: named tensors by parameter, some of them parked while their parameter is frozen."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Params = dict[str, Tensor]
Slots = dict[str, Tensor]
State = dict[str, Slots]


class Parked(dict[str, Tensor]):
    """Slots of a frozen parameter, kept for its return.

    `by` says which wrappers froze it, by their depth, and whether the wrapper keeps its slots on the host.
    """

    def __init__(self, slots: Slots, by: Mapping[int, bool]) -> None:
        super().__init__(slots)
        self.by = MappingProxyType(dict(sorted(by.items())))

    @property
    def host(self) -> bool:
        """Are these slots kept on the host?"""
        return any(self.by.values())


def trains(state: Mapping[str, Slots], name: str) -> bool:
    """Does this parameter train now? It has slots, be they none, and they are not parked."""
    return name in state and not isinstance(state[name], Parked)


def parked_by(slots: Slots) -> Mapping[int, bool]:
    """Which wrappers have parked these slots; none where the parameter trains."""
    return slots.by if isinstance(slots, Parked) else {}


def with_status(by: Mapping[int, bool], slots: Slots) -> Slots:
    """These slots, parked by these wrappers, or by none."""
    return Parked(slots, by) if by else dict(slots)


def place(slots: Slots, device: torch.device) -> Slots:
    """Slots where they are kept: on the host, pinned for a CUDA `device`, if parked there; else on `device`.

    A tensor that is there already, or has no memory, stays the same object.
    """
    host = isinstance(slots, Parked) and slots.host
    there = {slot: _hosted(t) if host else _moved(t, device) for slot, t in slots.items()}
    return with_status(parked_by(slots), there)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return t if t.is_meta else t.to(device, non_blocking=True)


def _hosted(t: Tensor) -> Tensor:
    if t.is_meta:
        return t
    return t.cpu().pin_memory() if t.is_cuda else t


def state_bytes(slots: Slots) -> int:
    """Bytes of one tensor's slots, scalars included."""
    return sum(t.numel() * t.element_size() for t in slots.values())


def total_bytes(state: State) -> int:
    """Bytes of a whole state; a tensor that several parameters share counts once."""
    return state_bytes({str(id(t)): t for slots in state.values() for t in slots.values()})
