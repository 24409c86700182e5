"""What a plugged-in optimizer is checked against: its groups, its parameters, and a state that is loaded into it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Group, Optimizer, Rule, UsageError
from .groups import KEPT, Groups, rule_of
from .registry import RULES
from .routing import check_sharded, flattened
from .state import Params, Slots, State, parked_by, state_bytes, total_bytes


def check_groups(
    groups: Groups, rules: Sequence[Rule], shapes: Mapping[str, torch.Size], refused: Mapping[str, str]
) -> None:
    """Raises UsageError where a group asks for what is not honoured, or its parameters are no more what they were."""
    known = options()
    for group, rule in zip(groups, rules, strict=True):
        for flag, instead in refused.items():
            if group.get(flag):
                raise UsageError(f"{flag}: got {group[flag]!r}, expected False: {instead}")
        if odd := sorted(key for key in group if key in known):
            raise UsageError(
                f"group {group['name']!r}: got the option {odd[0]!r} after the optimizer was made, when nothing reads "
                "it any more; give it when making the optimizer, or in add_param_group"
            )
        if rule_of(group) is not rule:
            raise UsageError(f"group {group['name']!r}: its rule or options were changed; make a new optimizer instead")
        if not float(group["lr"] if not isinstance(group["lr"], Tensor) else 0) >= 0:
            raise UsageError(f"group {group['name']!r}: lr must be at least 0, got {group['lr']}")
        if len(group["params"]) != len(group["param_names"]):
            raise UsageError(
                f"group {group['name']!r}: got {len(group['params'])} tensors for {len(group['param_names'])} names: "
                "they look flattened into one, as DeepSpeed's ZeRO does it; use DDP"
            )
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.shape != shapes[name]:
                raise UsageError(flattened(name, p, f"{tuple(shapes[name])}, as when the optimizer was made"))
            check_sharded(name, p)


def options() -> frozenset[str]:
    """The names of the options of all rules."""
    return frozenset(name for family in RULES.values() for name in vars(family.options)["__dataclass_fields__"])


def check_wrapped(optimizer: Optimizer, params: Params, state: State) -> None:
    """Raises UsageError where a wrapper needs what only the engine does."""
    if apart := [name for name, group in optimizer.owner.items() if group.rule.product]:
        raise UsageError(
            f"wrap: what it learns of {apart[0]!r} is apart from the weight, where a model has to look for it; "
            "expected the form 'merged', as Subspaces(rank=128, period=200) has it"
        )
    if optimizer.shared:
        raise UsageError(
            "wrap: its masks depend on the gradient norms of a run, which only the engine shows them; expected masks "
            "such as Masks(active=2, period=100)"
        )
    if any(parked_by(slots) for slots in state.values()):
        raise UsageError("wrap: it keeps the state of what is frozen; expected state_policy 'drop'")
    if any(optimizer.batch(step) != step for step in range(1000)):
        raise UsageError("wrap: it orders the batches, which are the loop's; expected order 'epochwise'")


def check_decay(groups: Groups, owner: Mapping[str, Group]) -> None:
    """Raises UsageError for a weight decay that was 0 when the optimizer was wrapped, and may have been left out."""
    for group in groups:
        if float(group["weight_decay"]) and any(not owner[name].weight_decay for name in group["param_names"]):
            raise UsageError(
                f"group {group['name']!r}: got weight_decay {group['weight_decay']}, expected 0 as when the optimizer "
                "was wrapped; make it with a weight_decay that is not 0"
            )


def check_owned(state: Mapping[Any, Any], names: Mapping[Tensor, str], masked: bool = False) -> None:
    """Raises UsageError for state of a parameter that is in no group, and for a parameter without state; where one may
    be `masked`, only if it has a gradient."""
    if any(p not in names for p in state):
        raise UsageError(
            "state: got that of a parameter which is in no group: a host has put other tensors in the groups, as "
            "FSDP2's prepare does, and left the state behind; make the optimizer after the model is wrapped"
        )
    asks = {p: p.requires_grad or p.grad is not None for p in names}
    lost = [name for p, name in names.items() if p not in state and (not masked or asks[p])]
    if lost and masked:
        raise UsageError(f"{lost[0]}: is frozen now, and asks for a gradient; leave requires_grad to the optimizer")
    if lost:
        raise UsageError(
            f"{lost[0]}: has no state: a host has put other tensors in the groups or cleared the state; make the "
            "optimizer after the model is wrapped"
        )


def check_left(left: Mapping[str, Tensor], state: Mapping[Any, Any]) -> None:
    """Raises UsageError for a parameter that was left out, as it was frozen, and is not frozen any more."""
    for name, p in left.items():
        if p.requires_grad and not any(p is other for other in state):
            raise UsageError(
                f"{name}: was frozen when the optimizer was made, and requires a gradient now; train it too with "
                f'add_param_group({{"params": [({name!r}, p)]}}), or freeze it'
            )


def checked(given: Mapping[str, Slots], expected: State) -> Mapping[str, Slots]:
    """A state that is to be loaded. Raises UsageError unless names, slots, shapes and dtypes are as expected."""
    given = {**{name: {} for name, slots in expected.items() if not slots}, **given}
    if odd := sorted(given.keys() ^ expected.keys()):
        which = "nothing for" if odd[0] in expected else "the unknown"
        raise UsageError(f"state: got {which} {odd[0]!r}; it is of {len(given)} parameters, expected {len(expected)}")
    for name, slots in expected.items():
        wanted, got = form(slots), form(given[name])
        if wanted != got:
            raise UsageError(
                f"state of {name}: got {got}, expected {wanted}; make the optimizer with the rule, the options and the "
                "parameters that the state was saved with"
            )
    return given


def check_dense(name: str, g: Tensor | None) -> None:
    """Raises UsageError for a sparse gradient."""
    if g is not None and g.is_sparse:
        raise UsageError(f"{name}: got a sparse gradient, expected a dense one; give sparse=False")


def form(slots: Mapping[str, Any]) -> dict[str, object]:
    """What slots look like: shapes and dtypes."""
    return {n: (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else type(t) for n, t in slots.items()}


def copy_slots(mine: Slots, given: Slots) -> None:
    """Write one parameter's slots into those that are there, whatever device they come from."""
    for slot, t in mine.items():
        if t is not given[slot]:
            t.copy_(given[slot])


def follow(slots: Slots, p: Tensor) -> None:
    """Bring slots to the device of their parameter, which a host may have moved since they were made."""
    for slot, t in slots.items():
        if t.device != p.device:
            slots[slot] = t.to(p.device)


def matched(saved: Mapping[str, Any], groups: Groups) -> tuple[State, Groups]:
    """A state dict of torch's form as (state by name, what its groups say beside their parameters).

    Names are those of `groups`. Raises UsageError where it has other groups, rules or options.
    """
    theirs = saved["param_groups"]
    sizes = [len(group["params"]) for group in theirs]
    if sizes != (mine := [len(group["params"]) for group in groups]):
        raise UsageError(f"state dict: got groups of {sizes} parameters, expected {mine}")
    state: State = {}
    said: Groups = []
    for own, group in zip(groups, theirs, strict=True):
        if "rule" not in group or "options" not in group or "count" not in group:
            raise UsageError(
                f"state dict: got a group with the keys {sorted(map(str, group))}, expected rule, options and count: "
                "it was saved by another optimizer"
            )
        rule, other = rule_of(own), rule_of(group)
        if own.get("wrapped") != group.get("wrapped"):
            raise UsageError(
                f"state dict: was saved under {group.get('wrapped', 'no wrapper')}, expected "
                f"{own.get('wrapped', 'no wrapper')}; make the optimizer with the same wrap and seed"
            )
        if rule is not other or own["added"] != group["added"]:
            raise UsageError(
                f"state dict: group {own['name']!r} was saved with {_said(group)}, expected {_said(own)}; make the "
                "optimizer with the options that it was saved with"
            )
        names, places = own["param_names"], group.get("param_names", own["param_names"])
        if set(names) != set(places):
            places = names  # other names for the same parameters, in the same order
        for name, number in zip(places, group["params"], strict=True):
            if number in saved["state"]:
                state[name] = dict(saved["state"][number])
        kept = ("params", "param_names", "rule", "options")
        said.append({key: value for key, value in group.items() if key not in kept})
    known = {number for group in theirs for number in group["params"]}
    if odd := [number for number in saved["state"] if number not in known]:
        raise UsageError(f"state dict: got state of a parameter {odd[0]!r} which is in none of its groups")
    return state, said


def receipt(groups: Groups, state: State, left: Mapping[str, Tensor]) -> str:
    """A table as text: who trains what, why, at which rate, and what the state takes."""
    rows = [("group", "rule", "tensors", "elements", "state MiB", "lr", "decay", "why")]
    for group in groups:
        named = dict(zip(group["param_names"], group["params"], strict=True))
        rank = group["options"].get("rank")
        rows.append(
            (
                group["name"],
                group["rule"] + (f" rank {rank}" if rank is not None else ""),
                str(len(named)),
                f"{sum(p.numel() for p in named.values()):,}",
                f"{sum(state_bytes(state[name]) for name in named if name in state) / 2**20:.2f}",
                f"{float(group['lr']):g}",
                f"{float(group['weight_decay']):g}",
                f"{group['why']}: {_few(named)}",
            )
        )
    if left:
        size = f"{sum(p.numel() for p in left.values()):,}"
        rows.append(("frozen", "-", str(len(left)), size, "0.00", "-", "-", f"no gradient asked for: {_few(left)}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]) for row in rows]
    return "\n".join([*lines, f"state {total_bytes(state) / 2**20:.2f} MiB"])


def _said(group: Mapping[str, Any]) -> str:
    """What the rule of a group is made of."""
    return f"{group['rule']} {group['options']}, kept in {[group.get(key, 'fp32') for key in KEPT]}"


def _few(names: Iterable[str]) -> str:
    some = list(names)
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
