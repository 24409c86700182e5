"""Memory counted without allocating any: which storages are alive when, while a program runs on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(NamedTuple):
    """The most bytes alive at once while the program was at one thing, and what kinds of tensors they were."""

    bytes: int
    kinds: dict[str, int]


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes births and deaths of storages while it is the current mode.

    A storage gets its kind from `doing` when it is born and may get another one later, when it is clear what became of
    it. `size` says what a storage of so many bytes occupies. Storages that were there before cost nothing, unless
    `adopt` counts them.
    """

    def __init__(self, size: Callable[[int], int] = lambda nbytes: nbytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self._doing = ("between segments", "other")
        self._paused = False
        self._sizes: list[int] = []
        self._kinds: list[str] = []
        self._events: list[tuple[int, str]] = []  # (a storage's index where it is born, ~index where it dies; moment)
        self._alive: dict[int, int] = {}  # address of a storage -> its index, or -1 for those that cost nothing

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo runs under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._found(t)
        out = func(*args, **(kwargs or {}))
        self.adopt(self._doing[1], (t for t in tree_leaves(out) if isinstance(t, Tensor)))
        return out

    def adopt(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors, where they are not counted yet."""
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self._alive:
                index = self._take(storage.nbytes(), kind)
                self._alive[storage._cdata] = index
                weakref.finalize(storage, self._gone, storage._cdata, index)

    def _found(self, t: Tensor) -> None:
        """A storage that was there before. Where it dies, the next one at its address counts."""
        storage = t.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = -1
            weakref.finalize(storage, self._alive.pop, storage._cdata, None)

    def workspace(self, nbytes: int) -> None:
        """Count memory that is taken and given back at once."""
        if nbytes and not self._paused:
            self._events.append((~self._take(nbytes, self._doing[1]), self._doing[0]))

    def _take(self, nbytes: int, kind: str) -> int:
        self._sizes.append(self.size(nbytes))
        self._kinds.append(kind)
        self._events.append((len(self._sizes) - 1, self._doing[0]))
        return len(self._sizes) - 1

    def _gone(self, address: int, index: int) -> None:
        self._events.append((~index, self._doing[0]))
        if self._alive.get(address) == index:
            del self._alive[address]

    @contextmanager
    def doing(self, moment: str, kind: str) -> Iterator[None]:
        """What is born in here is of this kind, at this moment of the program; inner ones come first."""
        before, self._doing = self._doing, (moment, kind)
        try:
            yield
        finally:
            self._doing = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing in here."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def mark(self) -> int:
        """The present, for `name_since`."""
        return len(self._sizes)

    def name_since(self, mark: int, kind: str) -> None:
        """What was born since `mark` and is still alive turns out to be of this kind."""
        for index in reversed(self._alive.values()):
            if 0 <= index < mark:
                break
            if index >= 0:
                self._kinds[index] = kind

    def name(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """These tensors turn out to be of this kind, where they are counted."""
        for t in tensors:
            if t is not None and (index := self._alive.get(t.untyped_storage()._cdata, -1)) >= 0:
                self._kinds[index] = kind

    def present(self) -> Peak:
        """What is alive now."""
        kinds: dict[str, int] = {}
        for index in self._alive.values():
            if index >= 0:
                kinds[self._kinds[index]] = kinds.get(self._kinds[index], 0) + self._sizes[index]
        return Peak(sum(kinds.values()), kinds)

    def events(self) -> int:
        """How many births and deaths so far, for `peaks`."""
        return len(self._events)

    def peaks(self, since: int = 0) -> dict[str, Peak]:
        """The peak of every moment after the first `since` events, in the order in which they were first reached."""
        alive, kinds, found = 0, dict[str, int](), dict[str, Peak]()
        for i, (event, moment) in enumerate(self._events):
            index = event if event >= 0 else ~event
            size = self._sizes[index] if event >= 0 else -self._sizes[index]
            alive += size
            kinds[self._kinds[index]] = kinds.get(self._kinds[index], 0) + size
            if i < since:
                continue
            if moment not in found or alive > found[moment].bytes:
                found[moment] = Peak(alive, dict(kinds))
        return found
