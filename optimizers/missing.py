"""Which tensors have no basis yet: a gradient of zeros gives none, so the first one that is not zero has to.

Until then a rule's `refresh` is called at every step, with `only_missing`: what is built already stays bitwise as it
is. So the numbers do not depend on when the host learns that a basis is there, and it need not wait for the device to
tell; only the work of a refresh is saved once it knows. A resumed run asks anew, and goes on bitwise.
"""

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from .contract import Group, Slots, State
from .state import trains


class Missing:
    """What may have no basis, as far as the host knows. Answers of the device are looked at once they have arrived."""

    def __init__(self, owner: Mapping[str, Group], state: State) -> None:
        self._owner = owner
        self._asked: dict[str, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._seen: dict[str, weakref.ref[Tensor]] = {}
        self.look(state)

    def look(self, state: State) -> None:
        """Ask of every tensor whose slots are others than at the last look: it may have been frozen, or starts anew."""
        for name, group in self._owner.items():
            slots = state[name] if trains(state, name) else None
            if group.rule.built is None or slots is None:
                self._asked.pop(name, None)
                self._seen.pop(name, None)
            elif name not in self._seen or self._seen[name]() is not next(iter(slots.values())):
                self.watch(name, slots)

    def watch(self, name: str, slots: Slots) -> None:
        """Ask the device whether this tensor has its basis now."""
        question = self._owner[name].rule.built
        assert question is not None, name
        answer, event = question(slots), None
        if answer.is_cuda:
            answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(answer, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._asked[name], self._seen[name] = (answer, event), weakref.ref(next(iter(slots.values())))

    def names(self) -> set[str]:
        """Those that have none, or whose answer is still on its way."""
        for name, (answer, event) in list(self._asked.items()):
            if (event is None or event.query()) and answer:  # type: ignore[no-untyped-call]
                del self._asked[name]
        return set(self._asked)
