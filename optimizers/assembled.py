"""What is made from the groups of a plugged-in optimizer, and made anew in a copy: rules, owners, missing bases."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import plugged
from .contract import Group, Hyper, Optimizer, Params, Slots, State, UsageError
from .groups import Groups, rule_of
from .missing import Missing
from .partition import partition
from .random import Key, fold

Wrap = Callable[[Optimizer, Params, Key], Optimizer]


class Assembled:
    """Who owns what, when bases are due, and which of them are missing.

    Parameters that were added together ("added" of their groups) have one optimizer of the engine, and one clock.
    """

    def __init__(self, groups: Groups, state: Mapping[Any, Slots], stagger: bool, wrap: Wrap | None) -> None:
        """`state` is what there is, by parameter. Raises UsageError where two parameters have one name, and where more
        were added to what is wrapped."""
        self.optimizers: dict[int, Optimizer] = {}
        self.missing: dict[int, Missing] = {}
        self.rules = [rule_of(group) for group in groups]
        self._hypers: dict[object, dict[str, Tensor]] = {}
        pairs = [pair for group in groups for pair in named(group)]
        self.shapes = {name: p.shape for name, p in pairs}
        if len(self.shapes) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise UsageError(f"params: two parameters are called {twice!r}; give each a name of its own")
        for added in sorted({group["added"] for group in groups}):
            if wrap and added:
                raise UsageError("add_param_group: what is wrapped takes no more parameters; make a new optimizer")
            owned, params = [], Params()
            for i, group in enumerate(groups):
                if group["added"] == added and group["params"]:
                    own = dict(named(group))
                    params |= {name: p.detach() for name, p in own.items()}
                    only = "|".join(map(re.escape, own))
                    owned.append(Group(str(i), self.rules[i], (f"^(?:{only})$",), 0.0, float(group["weight_decay"])))
            optimizer = partition(params, owned, stagger)
            self.optimizers[added] = wrap(optimizer, params, key_of(groups[0])) if wrap else optimizer
            there = {name: state[p] for name, p in pairs if name in params and p in state}
            self.missing[added] = Missing(self.optimizers[added].owner, there)

    def expected(self, groups: Groups, count: int) -> State:
        """A state without memory, as it stands before step `count`: what a loaded one has to look like."""
        state: State = {}
        for added, optimizer in self.optimizers.items():
            pairs = [pair for group in groups if group["added"] == added for pair in named(group)]
            state |= optimizer.init({name: torch.empty_like(p, device="meta") for name, p in pairs}, count + 1)
        return state

    def put(self, groups: Groups, kept: dict[Any, Slots], state: Mapping[str, Slots]) -> None:
        """Take over a state that fits: into the tensors that are there, and where there are none, as copies."""
        for name, p in (pair for group in groups for pair in named(group)):
            if name not in state:
                kept.pop(p, None)
            elif p in kept and plugged.form(kept[p]) == plugged.form(state[name]):
                plugged.copy_slots(kept[p], state[name])
            else:
                kept[p] = {slot: t.to(p.device, copy=True) for slot, t in state[name].items()}
        there = {name: kept[p] for group in groups for name, p in named(group) if p in kept}
        for missing in self.missing.values():
            missing.look(there)

    def switch(self, groups: Groups, kept: dict[Any, Slots]) -> None:
        """What a wrapper changes before the next step: parameters in place, and what has state."""
        params = {name: p for group in groups for name, p in named(group)}
        plain, there = {n: p.detach() for n, p in params.items()}, {n: kept[p] for n, p in params.items() if p in kept}
        moved, state = self.optimizers[0].switch(plain, there, groups[0]["count"], key_of(groups[0]))
        for name, p in params.items():
            if moved[name] is not plain[name]:
                plain[name].copy_(moved[name])
            kept.pop(p, None)
            if name in state:
                kept[p] = state[name]
        self.missing[0].look(state)

    def hyper(self, i: int, group: Mapping[str, Any], device: torch.device) -> Hyper:
        """lr and weight_decay of a group as 0-d tensors, which are filled and stay the same: nothing compiles anew."""
        if (i, device) not in self._hypers:
            made = {name: torch.zeros((), device=device) for name in ("lr", "weight_decay")}
            self._hypers[i, device] = made
        hyper = self._hypers[i, device]
        for name, t in hyper.items():
            t.copy_(group[name]) if isinstance(group[name], Tensor) else t.fill_(group[name])
        return hyper


def freeze(groups: Groups, kept: Mapping[Any, Slots], masked: bool) -> None:
    """Where a wrapper masks: ask for gradients of what trains now, and of nothing else that it holds."""
    for p in (p for group in groups for p in group["params"] if masked):
        p.requires_grad_(p in kept)
        if not p.requires_grad:
            p.grad = None


def named(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a group with their names."""
    return zip(group["param_names"], group["params"], strict=True)


def key_of(group: Mapping[str, Any]) -> Key:
    """The key of all draws for the parameters of a group."""
    return fold(group["seed"], "optimizer")
