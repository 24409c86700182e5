"""Every rule by its name: one file in `rules/`, and its name as one line here.

A `Family` has a name, an options dataclass (whose fields are what commands offer, checkpoints say and swaps compare)
and a builder: `RULES["sumo"](rank=8)` or `RULES["sumo"].of(Sumo(rank=8))` is the rule. All that lists rules reads this:
the recipes' `--optimizer NAME`, compare, plan, inspect, swap, and the table of the docs.
"""

from importlib import import_module
from typing import Any

from .contract import Family, Rule, UsageError

FILES = (
    "adamw",
    "sgd",
    "muon",
    "scale",
    "galore",
    "snsm",
    "sumo",
)


def families(file: str) -> list[Family[Any]]:
    """The families that a file in `rules/` makes, in its order; those that it imports aside."""
    module = import_module(f".rules.{file}", __package__)
    found = [value for value in vars(module).values() if isinstance(value, Family) and value.file == module.__name__]
    if not found:
        raise ImportError(f"optimizers/rules/{file}.py makes no Family: it needs NAME = Family('NAME', OPTIONS, build)")
    return found


def registered() -> dict[str, Family[Any]]:
    """The families of all files by their names, of which there may not be two alike."""
    found: dict[str, Family[Any]] = {}
    for file in FILES:
        for family in families(file):
            if family.name in found:
                raise ImportError(f"optimizers/rules/{file}.py: a rule {family.name!r} is in {found[family.name].file}")
            found[family.name] = family
    return found


RULES = registered()


def rule(name: str, **options: Any) -> Rule:
    """The rule of that name. Raises UsageError for a name or an option that nobody knows, and what the rule raises."""
    if name not in RULES:
        raise UsageError(f"optimizer {name!r} is not known; give one of {', '.join(RULES)}")
    try:
        return RULES[name](**options)
    except TypeError as error:
        known = ", ".join(vars(RULES[name].options)["__dataclass_fields__"])
        raise UsageError(f"{name}: {error}; its options are {known}") from None
