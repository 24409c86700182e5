"""A step of a plugged-in optimizer: layers move one by one, in any order, each by one call of the engine's kernel."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plugged
from .apply import Bound
from .assembled import Assembled, key_of, named
from .compile import compiled
from .contract import Hyper, Rule, Slots, UsageError
from .groups import Groups
from .kernel import Kernel, Seeds, make_kernel, rebuild_in_place
from .random import Key
from .routing import block


class Layer(NamedTuple):
    """What parameters that are updated by one kernel have in common."""

    added: int
    name: str
    device: torch.device
    key: Key
    rounding: bool


class Member(NamedTuple):
    """A parameter of a layer."""

    name: str
    p: Tensor
    rule: Rule
    hyper: Hyper
    maximize: bool


class Kernels:
    """The compiled or plain updates, which outlive a step."""

    def __init__(self, compile: bool, clip: Bound) -> None:
        self._compile, self._clip = compile, clip
        self._made: dict[object, Kernel] = {}
        self._seeds: dict[tuple[Key, torch.device], Seeds] = {}

    def seeds(self, layer: Layer) -> Seeds:
        """Of what is rounded stochastically in this layer."""
        return self._seeds.setdefault((layer.key, layer.device), Seeds(layer.key, layer.device))

    def of(self, members: Sequence[Member], rounding: bool) -> Kernel:
        """The update of these parameters, shared by all layers with the same rules, shapes and dtypes. Where
        `rounding`, weights are rounded stochastically."""
        kind = rounding, tuple((one.rule, one.p.shape, one.p.dtype) for one in members)
        if kind not in self._made:
            kernel = make_kernel([one.rule for one in members], self._clip, rounding)
            self._made[kind] = compiled(kernel) if self._compile else kernel
        return self._made[kind]


class Motion:
    """A step that has begun: `layers` are those that have not moved yet, with their parameters.

    Rates, weight decays and what is due are those of the beginning. A layer may move before the gradients of another
    are there.
    """

    def __init__(
        self,
        groups: Groups,
        state: Mapping[Any, Slots],
        made: Assembled,
        kernels: Kernels,
        bound: Tensor | None = None,
    ) -> None:
        """`state` holds the slots of what trains now; `bound`, 0-d, is what the kernels clip with, if they do."""
        self._state, self._made, self._kernels, self._bound = state, made, kernels, bound
        self.layers: dict[Layer, list[Member]] = {}
        self.layer_of: dict[Tensor, Layer] = {}
        self._rates = _rates(groups)
        for i, group in sorted(enumerate(groups), key=lambda pair: pair[1]["added"]):
            key, rounding = key_of(group), bool(group["stochastic_rounding"])
            for name, p in named(group):
                if p in state:
                    layer = Layer(group["added"], block(name), p.device, key, rounding)
                    rule = made.optimizers[layer.added].owner[name].rule
                    member = Member(name, p, rule, made.hyper(i, group, p.device), bool(group["maximize"]))
                    self.layers.setdefault(layer, []).append(member)
                    self.layer_of[p] = layer
        self._count = {group["added"]: group["count"] for group in groups}
        self._due = {added: set(one.due(self._count[added])) for added, one in made.optimizers.items()}
        self._absent = {added: one.names() for added, one in made.missing.items()}
        self._squares: list[Tensor] = []

    def move(self, layer: Layer, free: bool = False) -> None:
        """Move the parameters of a layer that have a gradient, which is then freed if that is asked for."""
        held = [(one, one.p.grad) for one in self.layers.pop(layer) if one.p.grad is not None]
        if not held:
            return
        members, grads = [one for one, _ in held], []
        count, optimizer = self._count[layer.added], self._made.optimizers[layer.added]
        slots = [self._state[one.p] for one in members]
        for (one, g), own in zip(held, slots, strict=True):
            plugged.follow(own, one.p)
            plugged.check_dense(one.name, g)
            grads.append(optimizer.inward(one.name, -g if one.maximize else g, own))
            self._rebuild(layer, one, grads[-1], own, count)
        bound = members[0].hyper["lr"] if self._bound is None else self._bound.to(layer.device)  # without clip not read
        names = tuple(one.name for one in members)
        drawing = layer.rounding or any(one.rule.draws for one in members)
        seed = self._kernels.seeds(layer).at(names, count) if drawing else None
        params = [one.p.detach() for one in members]
        kernel = self._kernels.of(members, layer.rounding)
        squares = kernel(grads, slots, params, [one.hyper for one in members], bound, seed)
        if self._bound is not None:
            self._squares.append(squares)
        if free:
            for one in members:
                one.p.grad = None

    def norm(self) -> Tensor:
        """The norm of all gradients that have moved something, before clipping; 0-d float32."""
        first = self._squares[0].device
        return torch.cat([squares.to(first, non_blocking=True) for squares in self._squares]).sum().sqrt()

    def check_rates(self, groups: Groups) -> None:
        """Raises UsageError where a rate was changed since the step began: layers that moved had the other one."""
        for group, then, now in zip(groups, self._rates, _rates(groups), strict=True):
            if then != now:
                raise UsageError(
                    f"group {group['name']!r}: its lr or weight_decay was changed between backward and step(), when "
                    "layers had moved by the old one; change it before backward, or after step()"
                )

    def _rebuild(self, layer: Layer, one: Member, g: Tensor, slots: Slots, count: int) -> None:
        """The basis of a parameter, where it is due or missing."""
        due, absent = one.name in self._due[layer.added], one.name in self._absent[layer.added]
        if due or absent:
            rebuild_in_place(one.rule, one.name, g, slots, count, layer.key, not due)
        if absent:
            self._made.missing[layer.added].watch(one.name, slots)


def _rates(groups: Iterable[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """What shows that a rate was changed: numbers by value, tensors by their version, so that nothing waits."""
    values = ([group[key] for key in ("lr", "weight_decay")] for group in groups)
    return [tuple((id(v), v._version) if isinstance(v, Tensor) else v for v in pair) for pair in values]
