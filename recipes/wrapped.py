"""What wraps a rule where a published model is fine-tuned: omgd, lisa and rso, over AdamW or, as omgd+sumo, any rule.

Options are those of the rule and of what wraps it, in one dataclass: each is a flag. Where both have one of the same
name, the rule's is `inner_…`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from optimizers.contract import Family, idle
from optimizers.registry import RULES


@dataclass(frozen=True)
class Omgd:
    active: int = 2
    """Layers that train at a time, drawn without replacement; embedding, head and last norm always train."""
    period: str = "1epoch"
    """How long they are held, such as 20step or 1epoch."""
    turn_warmup: int = 0
    """Steps over which the learning rate of a layer rises when it trains again (ours)."""


@dataclass(frozen=True)
class Lisa:
    active: int = 2
    """Layers that train at a time, drawn with replacement; embedding, head and last norm always train."""
    period: str = "20step"
    """How long they are held, such as 20step or 1epoch."""
    turn_warmup: int = 0
    """Steps over which the learning rate of a layer rises when it trains again (ours)."""


@dataclass(frozen=True)
class Rso:
    rank: int = 64
    """Columns of P and B, of W + B Pᵀ."""
    period: int = 200
    """Steps between two P."""
    turn_warmup: int = 0
    """Steps over which the learning rate of B rises after each P (ours)."""


WRAPPERS: Mapping[str, type] = {"omgd": Omgd, "lisa": Lisa, "rso": Rso}
OVER = "+"  # between a wrapper and its rule


def over(wrapper: str, family: Family[Any], name: str) -> Family[Any]:
    """The rule of `family` under a wrapper, as a family whose options are those of both."""
    own = WRAPPERS[wrapper]
    taken, hints = {f.name for f in dataclasses.fields(own)}, typing.get_type_hints(family.options)
    named = {f.name: f"inner_{f.name}" if f.name in taken else f.name for f in dataclasses.fields(family.options)}
    renamed = [
        (named[f.name], Annotated[hints[f.name], tyro.conf.arg(help=f"{family.name}'s own {f.name}.")], f)
        for f in dataclasses.fields(family.options)
        if f.name in taken
    ]

    def inner(options: Any) -> Any:
        return family.options(**{own_name: getattr(options, flag) for own_name, flag in named.items()})

    def nothing(options: Any) -> set[str]:
        return {named[option] for option in idle(inner(options))}

    kind = dataclasses.make_dataclass(
        name.title().replace(OVER, ""),
        [(flag, hint, dataclasses.field(default=f.default)) for flag, hint, f in renamed],
        bases=(own, family.options),
        frozen=True,
        namespace={"idle": nothing},
    )
    preset = {named[option]: value for option, value in family.preset.items()}
    return Family(name, kind, lambda _, options: family.of(inner(options)), **preset)


WRAPPED: Mapping[str, Family[Any]] = {wrapper: over(wrapper, RULES["adamw"], wrapper) for wrapper in WRAPPERS}
ANY: Mapping[str, Family[Any]] = {
    f"{wrapper}{OVER}{rule}": over(wrapper, family, f"{wrapper}{OVER}{rule}")
    for wrapper in WRAPPERS
    for rule, family in RULES.items()
}


def parts(name: str) -> tuple[str, str]:
    """A name of `--optimizer` as wrapper, "" where there is none, and rule."""
    if name in WRAPPERS:
        return name, "adamw"
    wrapper, plus, rule = name.partition(OVER)
    return (wrapper, rule) if plus else ("", name)
