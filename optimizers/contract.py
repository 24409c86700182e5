"""The contract of every optimizer here: pure functions over flat dicts of named tensors.

A *rule* moves one tensor and knows nothing else: no names, no tree, no clock, no device. An *optimizer* moves a
whole model: it says who owns which parameter, what is trainable now (`split`) and what changes between steps
(`switch`). Nothing here mutates its inputs; the engine decides where results are written.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol

from torch import Tensor

from .moments import Moments
from .random import Key
from .state import Params as Params
from .state import Slots as Slots
from .state import State as State
from .state import state_bytes as state_bytes
from .state import total_bytes as total_bytes
from .state import trains

Hyper = Mapping[str, Tensor]  # "lr" and "weight_decay", 0-d float32: a Python float that changes would recompile
SEED = "seed"  # in it, 0-d int32, for rules with `draws`: of this step's random draws for this tensor


class UsageError(ValueError):
    """What was asked for cannot be done. The message says: name, got, expected, what to do."""


class Refresh(Protocol):
    """A rule's refresh."""

    def __call__(self, g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]: ...


class Kind(StrEnum):
    """What a slot is there for."""

    FIRST = "first moments"
    SECOND = "second moments"
    BASIS = "bases"  # of a subspace, whatever it is stored as
    WEIGHT = "subspace weights"  # what trains in the place of a parameter
    BITS = "last bits of weights"  # what bfloat16 leaves out
    INDEX = "indices"  # which entries or slices are meant
    COUNTER = "scalars"  # of steps, and what else is a number


class Slot(NamedTuple):
    """A tensor of a rule's state, by its name. What is `given` is set by a wrapper between steps, not learned: it is
    never taken over from another optimizer. What is on the `host` stays there, wherever a model trains."""

    name: str
    kind: Kind
    given: bool = False
    host: bool = False


@dataclass(frozen=True)
class Rule:
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

    `options`, a frozen dataclass, is what the rule was made with: checkpoints say it, a swap compares it, commands make
    flags of it, with the string under a field as help. It may have a method `idle() -> set of names`: the options that
    change nothing beside the others, which commands then refuse.
    `slots` declares every slot of `init` with its kind, by which others read state; none of them knows a slot's name.
    `gradient(g, slots)` is what the rule is given of a gradient of p, where it moves something that stands for p;
    `product(slots)`, float32, is then what the model adds to p, if that is kept apart from it.
    `elementwise` says that an entry of p moves by its own entries of g and slots and by scalars alone, so that `update`
    may be given any part of the entries, flat. `draws` says that `update` rounds what it keeps by a seed in `hyper`.
    `betas` are the decays of the slots of `clock`, where it has them: whoever moves several tensors may advance their
    clocks at once, and gives `update` slots without them: see `clock.Clocks`.
    """

    name: str
    options: Any
    slots: tuple[Slot, ...]
    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Slots, Tensor, Hyper], tuple[Tensor | None, Slots]]
    refresh: Refresh | None = None
    gap: int = 0
    offset: int = 0
    export: Callable[[Slots, Tensor], Moments] | None = None
    adopt: Callable[[Moments, Slots, Tensor, Key], tuple[Slots, str]] | None = None
    built: Callable[[Slots], Tensor] | None = None
    gradient: Callable[[Tensor, Slots], Tensor] = lambda g, slots: g
    product: Callable[[Slots], Tensor] | None = None
    elementwise: bool = False
    draws: bool = False
    betas: tuple[float, float] | None = None

    def names(self, *kinds: Kind) -> tuple[str, ...]:
        """The slots of these kinds, in order."""
        return tuple(slot.name for slot in self.slots if slot.kind in kinds)

    def settings(self) -> dict[str, Any]:
        """The options as JSON can hold them, those of a rule inside (`over`) among them."""
        return flat(self.options)


def flat(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass; one called `over` holds another's options, which are told here too."""
    own = {field.name: getattr(options, field.name) for field in fields(options)}
    inner = own.pop("over", None)
    return {**(flat(inner) if inner is not None else {}), **own}


def idle(options: Any) -> set[str]:
    """The options that change nothing beside the others, of a dataclass that says so."""
    found: set[str] = options.idle() if hasattr(options, "idle") else set()
    return found


def declare(**kinds: Kind) -> tuple[Slot, ...]:
    """Slots by name."""
    return tuple(Slot(name, kind) for name, kind in kinds.items())


Chosen = ParamSpec("Chosen")


class Family(Generic[Chosen]):
    """A rule by its name, as the registry knows it: called with the fields of its options it gives the rule.

    `preset` replaces defaults of the options, for the variants that a paper names.
    """

    def __init__(
        self, name: str, options: Callable[Chosen, Any], build: Callable[[str, Any], Rule], **preset: Any
    ) -> None:
        self.name, self._build, self.preset = name, build, MappingProxyType(preset)
        self.options: Any = options
        self.file: str = build.__module__
        self.__doc__ = build.__doc__

    def __call__(self, *args: Chosen.args, **kwargs: Chosen.kwargs) -> Rule:
        return self.of(self.options(*args, **{**self.preset, **kwargs}))

    def default(self, **given: Any) -> Any:
        """The options that the rule has by default, but for those given."""
        return self.options(**{**self.preset, **given})

    def of(self, options: Any) -> Rule:
        """The rule with these options, which replace the preset too."""
        return self._build(self.name, options)


class Group(NamedTuple):
    """Parameters that share a rule and its scheduled numbers. `match` holds regular expressions, searched in names."""

    name: str
    rule: Rule
    match: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0
    why: str = ""


class Optimizer(ABC):
    """How a model moves: functions of flat dicts that write nothing. A wrapper is an optimizer over another one.

    `owner` maps every parameter that trains to its group. `metadata` goes into the head of every checkpoint's state,
    and must be the same in the run that goes on from it.
    """

    owner: Mapping[str, Group]
    metadata: Mapping[str, str]

    @property
    def shared(self) -> Mapping[str, tuple[Slot, ...]]:
        """Entries of the state that belong to no parameter, such as what masks have seen, with their slots."""
        return {}

    def declared(self, key: str) -> tuple[Slot, ...]:
        """The slots of an entry of the state."""
        return self.shared[key] if key in self.shared else self.owner[key].rule.slots

    @abstractmethod
    def init(self, params: Params, step: int = 0, shared: State | None = None) -> State:
        """The state as it stands once `step` steps are done, values aside: at 0, a fresh one.

        Where masks depend on what training has seen, that decides what has state: `shared` are the shared entries
        after `step` steps, by default those of a run that has seen nothing. They come last.
        Raises UsageError, with its name, where a rule cannot serve a parameter.
        """

    @abstractmethod
    def due(self, step: int, state: State | None = None) -> tuple[str, ...]:
        """The parameters whose rule refreshes at this step. `state` holds the shared entries, if there are any."""

    def split(self, params: Params, state: State) -> tuple[Params, Params]:
        """The model as its segments see it now: what is trainable, and what is frozen.

        A trainable name is a parameter, or something in the state that stands for one: see `parameter_of`.
        """
        now = {name for name in params if trains(state, name)}  # even without slots; a mask takes the entry away
        return {n: p for n, p in params.items() if n in now}, {n: p for n, p in params.items() if n not in now}

    @property
    def singly(self) -> frozenset[str]:
        """The parameters that train or rest each by itself, whatever others of their segment do.

        Of these, and of those that stand for them, compiled code has the gradients of all or of none of a segment, and
        moves each by a kernel of its own: otherwise every set that trains would be compiled anew.
        """
        return frozenset()

    def parameter_of(self, trained: str) -> str:
        """The parameter that is moved by the gradient of what `split` calls `trained`."""
        return trained

    def inward(self, name: str, g: Tensor, slots: Slots) -> Tensor:
        """From the gradient `g` of parameter `name` that of what is trained in its place, which its rule takes.

        For loops that know of parameters only: where the model itself has what stands for one, its gradient is there.
        """
        return g

    def switches(self, step: int) -> bool:
        """Does something change before this step: a mask, a subspace?"""
        return False

    def choose(self, shared: State, step: int) -> State:
        """The shared entries with what is decided before a step for which `switches` holds; cold, and it may wait for
        the device. It comes before `switch`, once."""
        return shared

    def switch(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        """What changes before a step for which `switches` holds; cold.

        It takes any part of the model, with that part's state and all shared entries, which it returns as they are: so
        the engine can switch one segment after another and never holds a second copy of the weights.
        """
        return params, state

    def observe(self, shared: State, squares: Sequence[tuple[Sequence[str], Tensor]]) -> State:
        """The shared entries after a step in which the gradients of these parameters, those of a segment together, had
        these squared norms before clipping, float32, one a parameter. Hot: it waits for nothing."""
        return shared

    def batch(self, step: int) -> int:
        """The batch that a step trains on, where order is part of the method."""
        return step

    def merge(self, params: Params, state: State) -> Params:
        """The weights that the model has without its optimizer; a tensor that is as it was is the same object."""
        return params
