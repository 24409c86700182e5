"""From what a caller gives to `torch.optim.Optimizer` (a model, named parameters, groups) to groups of one rule each.

A group is a dict of tensors, numbers, texts and dicts of them, so that it can be saved and read without running code.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from .contract import Family, Rule, UsageError, idle
from .registry import RULES
from .registry import rule as registered
from .routing import WHY, Place, bare, check_patterns, check_pieces, check_whole, chosen, kinds, place
from .storage.stored import BasesDtype, MomentsDtype, stored

Given = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Groups = list[dict[str, Any]]

FLAGS = ("maximize", "foreach", "fused", "capturable", "differentiable")
KEPT = ("moments_dtype", "bases_dtype")  # what slots are kept in
OWN = ("lr", "weight_decay", "seed", "stochastic_rounding", *KEPT, *FLAGS)
TEXTS = ("rule", "name", "options")  # of a group, beside the options of its rule
STD = "std"  # GaLore's name for projecting the shorter side, which all rules here do


class Wanted(NamedTuple):
    """What an optimizer was asked for, beside its parameters."""

    family: Family[Any]
    options: Mapping[str, Any]
    rest: str
    rest_lr: float | Tensor | None
    rest_options: Mapping[str, Any]
    match: Sequence[str]


def fields(name: str) -> list[str]:
    """The options of a rule."""
    if name not in RULES:
        raise UsageError(f"rule: got {name!r}, expected one of {', '.join(RULES)}")
    return [field.name for field in dataclasses.fields(RULES[name].options)]


def settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a rule, given some, as plain values. Raises UsageError for one that it does not have."""
    given = dict(options)
    if "proj_type" in given and "proj_type" not in fields(name) and (got := given.pop("proj_type")) != STD:
        raise UsageError(f"{name}: proj_type: got {got!r}, expected {STD!r}: the shorter side is projected")
    made = registered(name, **given)
    default = RULES[name].default()
    if odd := sorted(key for key in idle(made.options).intersection(given) if given[key] != getattr(default, key)):
        raise UsageError(f"{name}: got {odd[0]}={given[odd[0]]!r}, which changes nothing beside its other options")
    return made.settings()


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule of a group; groups with equal options share one, and with it compiled code."""
    kept = [group.get(key, "fp32") for key in KEPT]  # saved groups of version 1.0 say nothing of it
    return _made(RULES[group["rule"]], json.dumps(group["options"], sort_keys=True), *kept)


@lru_cache(maxsize=256)
def _made(family: Family[Any], options: str, moments_dtype: MomentsDtype, bases_dtype: BasesDtype) -> Rule:
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(options).items()}
    return stored(family.of(family.options(**plain)), moments_dtype, bases_dtype)


def groups_from(given: Given, wanted: Wanted, frozen: dict[str, Tensor], taken: int = 0) -> Groups:
    """Groups of one rule each, in the order of those given; what requires no gradient goes to `frozen`.

    A group that names a rule, or options of one, is that rule's as a whole; where one is the optimizer's own in that
    way, those that say nothing are the rest's, as GaLore's users write it. Any other is routed by `place`, and may
    become several. `taken` is the number of the first parameter without a name. Raises UsageError.
    """
    known = kinds(given) if isinstance(given, nn.Module) else {}
    items: list[Any] = list(given.named_parameters()) if isinstance(given, nn.Module) else list(given)
    if not items:
        raise UsageError("params: got nothing to train; give a model, its named_parameters(), or groups of them")
    plain: Groups = [dict(item) for item in items] if isinstance(items[0], dict) else [{"params": items}]
    for group in plain:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    said = [_explicit(group, wanted.family.name) for group in plain]
    mine = wanted.family.name
    own = any(yes and group.get("rule", mine) == mine for group, yes in zip(plain, said, strict=True))
    if wanted.match:
        names = [name for group in plain for name, _ in _pairs(group) or []]
        check_patterns(wanted.match, names)
    check_pieces(
        [pair for group, explicit in zip(plain, said, strict=True) if not explicit for pair in _pairs(group) or []]
    )
    made: Groups = []
    for group, explicit in zip(plain, said, strict=True):
        if own and not explicit:
            group = {**group, "rule": wanted.rest, "options": dict(wanted.rest_options)}
        made += _split(group, wanted, known, frozen, taken)
        taken += len(group["params"])
    return made


def numbered(groups: Groups, before: Groups, added: int) -> Groups:
    """The groups as torch takes them, behind those that were there `before`: each has a name of its own, names apart
    from tensors, the number of its addition, and a clock."""
    called = [group["name"] for group in before]
    for group in groups:
        same = sum(name.partition("#")[0] == group["name"] for name in called)
        group["name"] += f"#{same + 1}" if same else ""
        called.append(group["name"])
        group["param_names"] = [name for name, _ in group["params"]]
        group["params"] = [p for _, p in group["params"]]
        group |= {"added": added, "count": 0}
    return groups


def _explicit(group: Mapping[str, Any], name: str) -> bool:
    """Does a group say whose it is?"""
    return bool(group.keys() & {"rule", "options", "proj_type", *fields(name)})


def _pairs(group: Mapping[str, Any]) -> list[tuple[str, Tensor]] | None:
    """Names and tensors of a group; None where it has no names."""
    params: list[Any] = group["params"]
    if "param_names" in group:
        return list(zip(group["param_names"], params, strict=True))
    if all(isinstance(item, tuple) for item in params):
        return params
    if any(isinstance(item, tuple) for item in params):
        raise UsageError("params: got some parameters with a name and some without; give all of them a name")
    return None


def _split(
    group: dict[str, Any], wanted: Wanted, known: Mapping[int, Place], frozen: dict[str, Tensor], taken: int
) -> Groups:
    """One group of a caller as groups of one rule each."""
    name = group.get("rule", wanted.family.name)
    mine = (*fields(name), "proj_type")
    if odd := group.keys() - {"params", "param_names", "initial_lr", *OWN, *TEXTS, *mine}:
        raise UsageError(
            f"group: got the key {min(odd)!r}, which {name} reads nowhere; expected some of {[*OWN, *TEXTS]} and "
            f"options of {name}: {fields(name)}"
        )
    said = wanted.options if name == wanted.family.name else {}
    options = settings(name, {**said, **group.get("options", {}), **{key: group[key] for key in mine if key in group}})
    head = {"rule": name, "options": options, "name": group.get("name", name)}
    explicit = _explicit(group, name)
    whole = explicit or (rule_of(head).elementwise and not wanted.match)
    pairs = _pairs(group) or _unnamed(group, wanted, whole, taken)
    for key, p in [] if explicit else pairs:
        check_whole(key, p)
    frozen |= {bare(key): p for key, p in pairs if not p.requires_grad}
    pairs = [(bare(key), p) for key, p in pairs if p.requires_grad]
    own = {key: value for key, value in group.items() if key in (*OWN, "initial_lr")}
    if whole:
        return [{**own, **head, "why": "as its group says" if explicit else "everything", "params": pairs}]
    parts: dict[Place, list[tuple[str, Tensor]]] = {"rule": [], "norms": [], "rest": []}
    for key, p in pairs:
        parts[chosen(key, p, wanted.match) if wanted.match else place(key, p, known)].append((key, p))
    return [_part(where, part, own, wanted, head) for where, part in parts.items() if part]


def _part(
    where: Place, pairs: list[tuple[str, Tensor]], own: Mapping[str, Any], wanted: Wanted, head: Mapping[str, Any]
) -> dict[str, Any]:
    """One rule's part of a group."""
    group = {**own, "why": WHY[where], "params": pairs}
    if where == "rule":
        return {**group, **head, "why": f"match {' '.join(wanted.match)}" if wanted.match else WHY[where]}
    group |= {"rule": wanted.rest, "options": settings(wanted.rest, wanted.rest_options)}
    group |= {"name": f"{wanted.rest}-{where}"} | ({"weight_decay": 0.0} if where == "norms" else {})
    if isinstance(lr := group.get("lr") if wanted.rest_lr is None else wanted.rest_lr, Tensor):
        lr = lr.clone()  # schedulers write into it, once a group
    return group if lr is None else {**group, "lr": lr}


def _unnamed(group: Mapping[str, Any], wanted: Wanted, whole: bool, taken: int) -> list[tuple[str, Tensor]]:
    """Parameters without names, named by their place. Raises UsageError where routing needs names."""
    if group["params"] and not whole:
        raise UsageError(
            f"{wanted.family.name}: got parameters without names, expected names, which say what is an embedding, a "
            "norm or the head: give the model, model.named_parameters(), or groups of (name, parameter); a group with "
            f'"rule": "{wanted.family.name}", or options such as "rank", needs no names. In Hugging Face\'s Trainer '
            'give {"model": model, ...} as the optimizer\'s arguments'
        )
    return [(f"param.{taken + i}", p) for i, p in enumerate(group["params"])]
