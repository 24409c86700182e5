"""A rule whose slots are kept in fewer bytes than it sees.

    decode  ->  the rule, in float32  ->  encode            all of it inside the compiled kernel

Of what a rule makes anew at a step every entry is rounded stochastically, by bits that are a function of the step's
`seed`: so what is kept is right on average, and a decay that is smaller than half of a unit in the last place still
decays. What is made between steps (a basis, moments carried over into another one) is rounded to nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..contract import SEED, Group, Hyper, Kind, Rule, Slot, Slots, UsageError
from ..moments import Moments
from ..random import Key
from . import blocks
from .last_bits import Extended, extended
from .slots import SCALE, decoded, encoded

MomentsDtype = Literal["fp32", "bf16", "int8"]
BasesDtype = Literal["fp32", "bf16"]
MOMENTS = (Kind.FIRST, Kind.SECOND, Kind.WEIGHT)


@dataclass(frozen=True)
class Stored:
    """What slots are kept in, over the options of a rule."""

    moments_dtype: MomentsDtype
    bases_dtype: BasesDtype
    over: Any


def stored(rule: Rule, moments_dtype: MomentsDtype = "fp32", bases_dtype: BasesDtype = "fp32") -> Rule:
    """`rule` with its moments, and its bases where they are floating point, kept in these; see `slots` and `blocks`.

    In float32 it is the rule itself. Any other takes a `seed` (0-d int32) beside lr and weight decay in `hyper`, to
    round by; without one it rounds to nearest. Raises UsageError for what it does not know.
    """
    for option, got, known in (
        ("moments_dtype", moments_dtype, ("fp32", "bf16", "int8")),
        ("bases_dtype", bases_dtype, ("fp32", "bf16")),
    ):
        if got not in known:
            raise UsageError(f"{rule.name}: {option} must be one of {known}, got {got!r}")
    kinds = (MOMENTS if moments_dtype != "fp32" else ()) + ((Kind.BASIS,) if bases_dtype != "fp32" else ())
    if not rule.names(*kinds):
        return rule
    int8 = rule.names(*MOMENTS) if moments_dtype == "int8" else ()
    short = set(rule.names(*kinds)) - set(int8)
    positive, unseen = rule.names(Kind.SECOND), rule.names(Kind.FIRST, Kind.SECOND)
    refreshes, exports, adopts, question, product = rule.refresh, rule.export, rule.adopt, rule.built, rule.product

    def init(p: Tensor) -> Slots:
        made: Slots = {}
        for name, t in rule.init(p).items():
            if name in int8:
                made[name] = torch.zeros_like(t, dtype=torch.uint8 if name in positive else torch.int8)
                made[name + SCALE] = t.new_zeros(blocks.scales(t.shape))
            else:
                made[name] = t.to(torch.bfloat16) if name in short and t.is_floating_point() else t
        return made

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        seen = decoded(slots)
        delta, new = rule.update(g, seen, p, hyper)
        return delta, encoded(new, seen, slots, positive, hyper.get(SEED))

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        assert refreshes is not None
        seen = decoded(slots)
        new, ok = refreshes(g, seen, key, only_missing)
        return encoded(new, seen, slots, positive), ok

    def export(slots: Slots, p: Tensor) -> Moments:
        assert exports is not None
        return exports(decoded(slots), p)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert adopts is not None
        seen = decoded(slots)
        new, did = adopts(moments, seen, p, key)
        return encoded(new, seen, slots, positive), did

    def built(slots: Slots) -> Tensor:
        assert question is not None
        return question({name: t for name, t in slots.items() if name not in unseen})  # a basis is there or not

    def kept(slot: Slot) -> tuple[Slot, ...]:
        scale = slot._replace(name=slot.name + SCALE)
        return (slot, scale) if slot.name in int8 else (slot,)

    return replace(
        rule,
        options=Stored(moments_dtype, bases_dtype, rule.options),
        slots=tuple(own for slot in rule.slots for own in kept(slot)),
        init=init,
        update=update,
        refresh=refresh if refreshes else None,
        export=export if exports else None,
        adopt=adopt if adopts else None,
        built=built if question else None,
        gradient=lambda g, slots: rule.gradient(g, decoded(slots)),
        product=(lambda slots: product(decoded(slots))) if product else None,
        elementwise=rule.elementwise and not int8,
        draws=True,
    )


def plainly(options: Any) -> Any:
    """Options of a rule, under whatever wraps it, without what its slots and its weights are kept in."""
    if isinstance(options, Stored | Extended):
        return plainly(options.over)
    return replace(options, over=plainly(options.over)) if hasattr(options, "over") else options


def keep(
    groups: Sequence[Group], moments_dtype: MomentsDtype, bases_dtype: BasesDtype, last_bits: bool = False
) -> list[Group]:
    """These groups with what their rules hold kept in these, and with `last_bits` of bfloat16 weights beside it; groups
    that shared a rule share one still.

    Raises UsageError where a dtype changes nothing.
    """
    rules = {rule: stored(rule, moments_dtype, bases_dtype) for rule in dict.fromkeys(group.rule for group in groups)}
    check_kept(list(rules), moments_dtype, bases_dtype)
    rules = {rule: extended(kept) if last_bits else kept for rule, kept in rules.items()}
    return [group._replace(rule=rules[group.rule]) for group in groups]


def check_kept(rules: Sequence[Rule], moments_dtype: MomentsDtype, bases_dtype: BasesDtype) -> None:
    """Raises UsageError where none of these rules has anything to keep in these."""
    for option, got, kinds in (
        ("moments_dtype", moments_dtype, MOMENTS),
        ("bases_dtype", bases_dtype, (Kind.BASIS,)),
    ):
        if got != "fp32" and not any(rule.names(*kinds) for rule in rules):
            names = ", ".join(dict.fromkeys(rule.name for rule in rules))
            raise UsageError(f"{option}: got {got!r}, which changes nothing: {names} keep no {kinds[0].value}")
