"""The rule, its options and its learning rate for each parameter, in the head of a checkpoint, so that tools need not
guess."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from optimizers.contract import Group, Rule

from .tensorfile import CheckpointError, TensorFile

HEADING = "ownership"  # the key in the head


class RuleRecord(NamedTuple):
    """The group that owns a parameter, as the head of a checkpoint knows it; `lr` is that of the last step, `kinds` is
    what its rule's slots are there for, by name."""

    group: str = "?"
    rule: str = "?"
    lr: float = math.nan
    weight_decay: float = math.nan
    options: Mapping[str, Any] = {}
    kinds: Mapping[str, str] = {}


def described(group: Group, factor: float = 1.0) -> RuleRecord:
    """The owner that a group is; `factor` is what the schedule makes of its learning rate."""
    rule = group.rule
    return RuleRecord(group.name, rule.name, group.lr * factor, group.weight_decay, rule.settings(), _kinds(rule))


def _kinds(rule: Rule) -> dict[str, str]:
    return {slot.name: str(slot.kind) for slot in rule.slots}


def rules_head(owner: Mapping[str, Group], factor: float) -> dict[str, str]:
    """For the head of a checkpoint: rule, rate, decay and settings by group, and every parameter's group. A group with
    several rules is there several times, as "name", "name#2" and so on.

    `factor` is what the schedule made of the learning rates at the last step.
    """
    keys: dict[tuple[str, Rule], str] = {}
    said: dict[str, Any] = {}
    for group in owner.values():
        same = sum(name == group.name for name, _ in keys)  # a mask may wrap the rule of a part of a group
        key = keys.setdefault((group.name, group.rule), f"{group.name}#{same + 1}" if same else group.name)
        said[key] = {
            "rule": group.rule.name,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "gap": group.rule.gap,
            "options": group.rule.settings(),
            "slots": _kinds(group.rule),
        }
    group_of = {name: keys[group.name, group.rule] for name, group in owner.items()}
    names = {group.name: group.rule.name for group in owner.values()}
    owned = {"rate": factor, "groups": said, "group_of": group_of}
    return {"optimizer": ",".join(names.values()), HEADING: json.dumps(owned)}


def read_rules(state: TensorFile) -> dict[str, RuleRecord]:
    """The owner of each parameter from a head that `rules` wrote; nothing where it did not. Raises CheckpointError."""
    if HEADING not in state.head:
        return {}
    match state.json(HEADING, dict):
        case {"rate": float(rate) | int(rate), "groups": dict(groups), "group_of": dict(group_of)}:
            pass
        case _:
            raise CheckpointError(f"{state.file}: damaged, {HEADING!r} in its head lacks rate, groups or group_of")
    owners = {}
    for name, group in group_of.items():
        match groups.get(group) if isinstance(group, str) else None:
            case {
                "rule": str(rule),
                "lr": float(lr) | int(lr),
                "weight_decay": float(wd) | int(wd),
                "options": dict(own),
            }:
                kinds = groups[group].get("slots", {})  # not in heads of version 1.0: slots had the usual names
                if not isinstance(kinds, dict):
                    raise CheckpointError(f"{state.file}: damaged, its head has no slots for {group!r}")
                owners[name] = RuleRecord(re.sub(r"#\d+$", "", group), rule, lr * rate, wd, own, kinds)
            case entry:
                raise CheckpointError(f"{state.file}: damaged, its head gives {name} to {group!r}, which is {entry!r}")
    return owners
