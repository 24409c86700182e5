"""Every rule by its name: one file in `rules/` and one line here.

A `Family` has a name, an options dataclass (whose fields are what commands offer, checkpoints say and swaps compare)
and a builder: `RULES["sumo"](rank=8)` or `RULES["sumo"].of(Sumo(rank=8))` is the rule. All that lists rules reads this:
the recipes' `--optimizer NAME`, compare, plan, inspect, swap, and the table of the docs.
"""

from typing import Any

from .contract import Family, Rule, UsageError
from .rules.adamw import adamw
from .rules.galore import galore
from .rules.muon import muon
from .rules.sgd import sgd
from .rules.snsm import adagrad_sn, adagrad_snsm, adam_sm, adam_sn, adam_snsm, rmsprop_sn, sgd_sm, snsm
from .rules.sumo import sumo, sumo_paper, sumo_release

RULES: dict[str, Family[Any]] = {
    family.name: family
    for family in (
        adamw,
        sgd,
        muon,
        galore,
        *(snsm, adam_snsm, adagrad_snsm, adam_sn, adagrad_sn, rmsprop_sn, adam_sm, sgd_sm),
        *(sumo, sumo_paper, sumo_release),
    )
}


def rule(name: str, **options: Any) -> Rule:
    """The rule of that name. Raises UsageError for a name or an option that nobody knows, and what the rule raises."""
    if name not in RULES:
        raise UsageError(f"optimizer {name!r} is not known; give one of {', '.join(RULES)}")
    try:
        return RULES[name](**options)
    except TypeError as error:
        known = ", ".join(vars(RULES[name].options)["__dataclass_fields__"])
        raise UsageError(f"{name}: {error}; its options are {known}") from None
