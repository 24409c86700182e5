"""Who owns which parameter, and when their bases are rebuilt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .contract import Group, Optimizer, Params, State, UsageError


def freeze(params: Params, patterns: Sequence[str]) -> None:
    """Set requires_grad to False where one of these regular expressions is found in the name.

    Raises UsageError where a pattern matches nothing, or nothing is left to train.
    """
    for pattern in patterns:
        try:
            matched = [p for name, p in params.items() if re.search(pattern, name)]
        except re.error as error:
            raise UsageError(f"freeze: {pattern!r} is no regular expression: {error}") from None
        if not matched:
            raise UsageError(
                f"freeze: pattern {pattern!r} matches no parameter; the names look like {list(params)[:3]}"
            )
        for p in matched:
            p.requires_grad_(False)
    if patterns and not trainable(params):
        raise UsageError(f"freeze: {list(patterns)} match every parameter, so there is nothing to train; freeze fewer")


def trainable(params: Params) -> Params:
    """Those that are not frozen: a module's parameter is where its requires_grad is False."""
    return {n: p for n, p in params.items() if p.requires_grad or not isinstance(p, nn.Parameter)}


def route(names: Sequence[str], groups: Sequence[Group], frozen: Sequence[str] = ()) -> dict[str, Group]:
    """Give every name to the first group with a matching pattern. `frozen` names may be matched, and get no owner.

    Raises UsageError where a pattern matches nothing, a group ends up with nothing, or a name has no owner.
    """
    owner: dict[str, Group] = {}
    for name in names:
        for group in groups:
            if any(re.search(pattern, name) for pattern in group.match):
                owner[name] = group
                break
        else:
            raise UsageError(
                f"parameter {name!r} is owned by no rule; add a pattern that matches it to one of "
                f"{[g.name for g in groups]}"
            )
    for group in groups:
        for pattern in group.match:
            if not any(re.search(pattern, name) for name in (*names, *frozen)):
                raise UsageError(
                    f"pattern {pattern!r} of {group.name!r} matches no parameter; the names look like {list(names)[:3]}"
                )
        if group not in owner.values() and not any(re.search(p, name) for p in group.match for name in frozen):
            raise UsageError(
                f"group {group.name!r} owns nothing: earlier groups already own all that {list(group.match)} match"
            )
    return owner


def stagger(sizes: Mapping[str, int], gap: int) -> dict[str, int]:
    """Offsets in [0, gap) that spread refreshes over steps so that each step does about the same work.

    `sizes` is the cost of each refresh (elements). Tensors are laid end to end, by name, on a circle of `gap` steps, so
    that the order of `sizes` does not matter.
    """
    total, seen, offsets = sum(sizes.values()), 0, {}
    for name in sorted(sizes):
        offsets[name] = seen * gap // total
        seen += sizes[name]
    return {name: offsets[name] for name in sizes}


@dataclass(frozen=True, eq=False)
class Partition(Optimizer):
    """Every parameter that has an owner trains all the time. `offsets`: of those with a basis, the step in a gap at
    which it is rebuilt."""

    owner: Mapping[str, Group]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def init(self, params: Params, step: int = 0, shared: State | None = None) -> State:
        return blank(self.owner, params)

    def due(self, step: int, state: State | None = None) -> tuple[str, ...]:
        gaps = {name: self.owner[name].rule.gap for name in self.offsets}
        return tuple(n for n, offset in self.offsets.items() if step == 0 or step % gaps[n] == offset)


def partition(params: Params, groups: Sequence[Group], staggered: bool = True) -> Optimizer:
    """An optimizer that gives every parameter to one group and trains all of them all the time, the frozen ones
    (see `trainable`) aside: they have no owner and no state.

    With `staggered`, bases are rebuilt a few tensors a step (all of them on step 0) instead of all on the same step.
    Raises UsageError as `route` does, where everything is frozen, and where a rule cannot serve a tensor it is given.
    """
    trained = trainable(params)
    if params and not trained:
        raise UsageError("every parameter is frozen (requires_grad=False): there is nothing to train; unfreeze some")
    owner = route(list(trained), groups, [name for name in params if name not in trained])
    gapped = {n: params[n].numel() for n, g in owner.items() if g.rule.gap}
    offsets = {n: owner[n].rule.offset for n in gapped}
    if staggered:
        for gap in {owner[n].rule.gap: None for n in gapped}:
            spread = stagger({n: s for n, s in gapped.items() if owner[n].rule.gap == gap}, gap)
            offsets |= {n: (offset + offsets[n]) % gap for n, offset in spread.items()}

    return Partition(owner, offsets)


def blank(owner: Mapping[str, Group], params: Params) -> State:
    """A fresh state for the parameters that have an owner.

    Raises UsageError, with its name, where a rule cannot serve one.
    """
    state = {}
    for name, p in params.items():
        if name not in owner:
            continue
        try:
            state[name] = owner[name].rule.init(p)
        except UsageError as error:
            raise UsageError(f"{name} {tuple(p.shape)}: {error}") from None
    return state
