"""The contract of every optimizer here: pure functions over flat dicts of named tensors.

A *rule* moves one tensor and knows nothing else: no names, no tree, no clock, no device. An *optimizer* moves a
whole model: it says who owns which parameter, what is trainable now (`view`) and what changes between steps
(`turn`). Nothing here mutates its inputs; the engine decides where results are written.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from torch import Tensor

from .moments import Moments
from .random import Key

Params = dict[str, Tensor]
Slots = dict[str, Tensor]
State = dict[str, Slots]
Hyper = Mapping[str, Tensor]  # "lr" and "weight_decay", 0-d float32: a Python float that changes would recompile


class UsageError(ValueError):
    """What was asked for cannot be done. The message says: name, got, expected, what to do."""


class Refresh(Protocol):
    """A rule's refresh."""

    def __call__(self, g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]: ...


class Rule(NamedTuple):
    """How one tensor moves.

    `init(p) -> slots` allocates state and draws nothing. `update(g, slots, p, hyper) -> (delta, slots)` is hot and
    is compiled; the new value is `p + delta`, or p itself where delta is None. `refresh(g, slots, key) -> (slots, ok)`
    is cold and eager: every `gap` steps it rebuilds what depends on this step's gradient (a subspace basis) before
    `update` sees it; `ok` is a 0-d bool that is False where the gradient was unusable and old slots were kept. That is
    at step 0 and where step mod gap = `offset`. Given `only_missing` it rebuilds what was never built, as no gradient
    was usable yet, and leaves the rest bitwise as it is: so it may be called at any step until there is a basis, and
    nobody has to know on the host whether there is one; `built(slots)`, a 0-d bool, says so. `export(slots, p)` and
    `adopt(moments, slots, p, key)`, cold too, carry what was learned to another rule: see `moments`. `adopt` gets fresh
    slots and both moments, and returns slots and what it did to them.
    """

    name: str
    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Slots, Tensor, Hyper], tuple[Tensor | None, Slots]]
    refresh: Refresh | None = None
    gap: int = 0
    offset: int = 0
    export: Callable[[Slots, Tensor], Moments] | None = None
    adopt: Callable[[Moments, Slots, Tensor, Key], tuple[Slots, str]] | None = None
    built: Callable[[Slots], Tensor] | None = None


class Group(NamedTuple):
    """Parameters that share a rule and its scheduled numbers. `match` holds regular expressions, searched in names."""

    name: str
    rule: Rule
    match: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    why: str = ""


class Optimizer(NamedTuple):
    """How a model moves. `owner` maps every parameter to its group.

    `init(params, step)` is the state as it stands once `step` steps are done, values aside: at 0, a fresh one.
    `view(params, state) -> (trainable, frozen)` is the model as its segments see it now. A trainable name is a
    parameter, or something in the state that stands for one: its gradient moves the parameter `moves[name]`.
    `due(step)` names the parameters whose rule refreshes at this step.
    `turn(params, state, step, key) -> (params, state)` is cold: what changes between steps (a mask, a subspace),
    before those steps for which `turns` holds. It takes any part of the model, so that the engine can turn one segment
    after another and never holds a second copy of the weights. `batch(step)` is the batch that a step trains on, where
    order is part of the method. `merge(params, state)` are the weights that a model has without its optimizer. `about`
    goes into the head of every checkpoint's state.
    """

    owner: Mapping[str, Group]
    init: Callable[..., State]
    update: Callable[[Params, State, Params, Mapping[str, Hyper]], tuple[Params, State]]
    due: Callable[[int], tuple[str, ...]]
    view: Callable[[Params, State], tuple[Params, Params]] = lambda params, state: (params, {})
    turns: Callable[[int], bool] = lambda step: False
    turn: Callable[[Params, State, int, Key], tuple[Params, State]] = lambda params, state, step, key: (params, state)
    moves: Mapping[str, str] = MappingProxyType({})
    batch: Callable[[int], int] = lambda step: step
    about: Mapping[str, str] = MappingProxyType({})
    merge: Callable[[Params, State], Params] = lambda params, state: params


PARKED = "parked:"  # before a parameter's name in the state: slots of a frozen tensor, kept for its return


def part(state: State, names: Iterable[str]) -> State:
    """The state of these parameters, parked slots among it."""
    own = set(names)
    return {key: slots for key, slots in state.items() if key.removeprefix(PARKED) in own}


def state_bytes(slots: Slots) -> int:
    """Bytes of one tensor's slots, scalars included."""
    return sum(t.numel() * t.element_size() for t in slots.values())


def total_bytes(state: State) -> int:
    """Bytes of a whole state; a tensor that several parameters share counts once."""
    return state_bytes({str(id(t)): t for slots in state.values() for t in slots.values()})
