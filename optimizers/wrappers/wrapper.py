"""What every wrapper is: an optimizer over another one, to which it leaves all that it does not change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..contract import Group, Optimizer, Params, Slot, Slots, State
from ..random import Key


@dataclass(frozen=True, eq=False)
class Wrapper(Optimizer):
    """An optimizer that does what `base` does. Wrappers of wrappers are a fold: each asks the one below it."""

    base: Optimizer
    owner: Mapping[str, Group]
    metadata: Mapping[str, str]

    @property
    def shared(self) -> Mapping[str, tuple[Slot, ...]]:
        return self.base.shared

    def init(self, params: Params, step: int = 0, shared: State | None = None) -> State:
        return self.base.init(params, step, shared)

    def due(self, step: int, state: State | None = None) -> tuple[str, ...]:
        return self.base.due(step, state)

    def split(self, params: Params, state: State) -> tuple[Params, Params]:
        return self.base.split(params, state)

    @property
    def singly(self) -> frozenset[str]:
        return self.base.singly

    def parameter_of(self, trained: str) -> str:
        return self.base.parameter_of(trained)

    def inward(self, name: str, g: Tensor, slots: Slots) -> Tensor:
        return self.base.inward(name, g, slots)

    def switches(self, step: int) -> bool:
        return self.base.switches(step)

    def choose(self, shared: State, step: int) -> State:
        return self.base.choose(shared, step)

    def switch(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        return self.base.switch(params, state, step, key)

    def observe(self, shared: State, squares: Sequence[tuple[Sequence[str], Tensor]]) -> State:
        return self.base.observe(shared, squares)

    def batch(self, step: int) -> int:
        return self.base.batch(step)

    def merge(self, params: Params, state: State) -> Params:
        return self.base.merge(params, state)
