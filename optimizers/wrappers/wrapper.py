"""What every wrapper is: an optimizer over another one, to which it leaves all that it does not change."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..contract import Group, Optimizer, Params, State
from ..random import Key


@dataclass(frozen=True, eq=False)
class Wrapper(Optimizer):
    """An optimizer that does what `base` does. Wrappers of wrappers are a fold: each asks the one below it."""

    base: Optimizer
    owner: Mapping[str, Group]
    metadata: Mapping[str, str]

    def init(self, params: Params, step: int = 0) -> State:
        return self.base.init(params, step)

    def due(self, step: int) -> tuple[str, ...]:
        return self.base.due(step)

    def split(self, params: Params, state: State) -> tuple[Params, Params]:
        return self.base.split(params, state)

    def parameter_of(self, trained: str) -> str:
        return self.base.parameter_of(trained)

    def switches(self, step: int) -> bool:
        return self.base.switches(step)

    def switch(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        return self.base.switch(params, state, step, key)

    def batch(self, step: int) -> int:
        return self.base.batch(step)

    def merge(self, params: Params, state: State) -> Params:
        return self.base.merge(params, state)
