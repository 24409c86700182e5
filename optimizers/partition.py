"""Who owns which parameter, and when their bases are rebuilt."""

import re
from collections.abc import Mapping, Sequence

from .apply import updating
from .contract import Group, Optimizer, Params, State, UsageError


def route(names: Sequence[str], groups: Sequence[Group]) -> dict[str, Group]:
    """Give every name to the first group with a matching pattern.

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
            if not any(re.search(pattern, name) for name in names):
                raise UsageError(
                    f"pattern {pattern!r} of {group.name!r} matches no parameter; the names look like {list(names)[:3]}"
                )
        if group not in owner.values():
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


def partition(params: Params, groups: Sequence[Group], staggered: bool = True) -> Optimizer:
    """An optimizer that gives every parameter to one group and trains all of them all the time.

    With `staggered`, bases are rebuilt a few tensors a step (all of them on step 0) instead of all on the same step.
    Raises UsageError as `route` does, and where a rule cannot serve a tensor it is given.
    """
    owner = route(list(params), groups)
    gapped = {n: params[n].numel() for n, g in owner.items() if g.rule.gap}
    offsets = {n: owner[n].rule.offset for n in gapped}
    if staggered:
        for gap in {owner[n].rule.gap: None for n in gapped}:
            spread = stagger({n: s for n, s in gapped.items() if owner[n].rule.gap == gap}, gap)
            offsets |= {n: (offset + offsets[n]) % gap for n, offset in spread.items()}

    def due(step: int) -> tuple[str, ...]:
        return tuple(n for n, offset in offsets.items() if step == 0 or step % owner[n].rule.gap == offset)

    return Optimizer(owner, lambda params, step=0: blank(owner, params), updating(owner), due)


def blank(owner: Mapping[str, Group], params: Params) -> State:
    """A fresh state for these parameters. Raises UsageError, with its name, where a rule cannot serve one."""
    state = {}
    for name, p in params.items():
        try:
            state[name] = owner[name].rule.init(p)
        except UsageError as error:
            raise UsageError(f"{name} {tuple(p.shape)}: {error}") from None
    return state
