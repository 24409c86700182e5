"""What the slots of a parameter are there for, by the kinds that its rule declares, and whether they can be its own.

Of a rule no slot's name is known here, and a rule with other names is measured alike. What rules share, or
wrappers lay around them, has the names that these give it: the clock's, a mask's entries, P and B of a subspace.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from optimizers import linalg
from optimizers.clock import CORRECTION, STEP
from optimizers.contract import Kind, Slots
from optimizers.linalg import projections
from optimizers.wrappers.masked import ENTRIES
from optimizers.wrappers.subspace import B, P

from ..checkpoint.rules import RuleRecord
from ..checkpoint.tensorfile import CheckpointError

FLOAT = "floating point"
KINDS = ("weights", *Kind, "other state")
USUAL = {  # where a head does not say what slots are there for
    **dict.fromkeys(("exp_avg", "momentum_buffer"), Kind.FIRST),
    "exp_avg_sq": Kind.SECOND,
    **dict.fromkeys(("basis", "signs", P), Kind.BASIS),
    **dict.fromkeys((STEP, CORRECTION), Kind.COUNTER),
    B: Kind.WEIGHT,
    "index": Kind.INDEX,
}


def kind(name: str, t: Tensor, who: RuleRecord) -> str:
    """What a slot is there for: as its rule declares it, else by its usual name."""
    declared = who.kinds.get(name, USUAL.get(name))
    if declared is not None:
        return str(declared)
    if t.ndim == 0:
        return str(Kind.COUNTER)
    return "other state" if t.is_floating_point() else str(Kind.INDEX)


class Roles(NamedTuple):
    """The first slot of each kind, by its name; "" where there is none. Wrappers' own slots are none of them."""

    first: str
    second: str
    basis: str  # floating point (..., side, r)
    signs: str  # int8 (short,), of a transform that stands for a basis
    picks: str  # int64 (..., r), which rows or columns


def roles(slots: Slots, who: RuleRecord) -> Roles:
    """Which slot is what."""
    own = {name: t for name, t in slots.items() if name not in (ENTRIES, P, B)}

    def first(sort: Kind, floating: bool | None = None) -> str:
        fits = (
            name for name, t in own.items() if kind(name, t, who) == sort and floating in (None, t.is_floating_point())
        )
        return next(fits, "")

    return Roles(
        first(Kind.FIRST), first(Kind.SECOND), first(Kind.BASIS, True), first(Kind.BASIS, False), first(Kind.INDEX)
    )


def moved(p: Tensor, slots: Slots) -> Tensor:
    """What the slots are of: p; the entries of it that train now; or the B that moves it, out of its values."""
    if ENTRIES in slots:
        return p.flatten()[slots[ENTRIES].long()]
    return p.new_zeros(p.shape[0], slots[P].shape[-1]) if P in slots else p


def rank(slots: Slots, who: RuleRecord) -> int | None:
    """Columns of the subspace that p moves in, the outermost where there are several; None without one."""
    role = roles(slots, who)
    return next((slots[name].shape[-1] for name in (P, role.basis, role.picks) if name in slots), None)


def subspace(slots: Slots, p: Tensor, who: RuleRecord) -> tuple[Tensor, bool] | None:
    """(Q (..., side, r) with orthonormal columns, whether it lies on p's longer side), also where it is stored as
    indices and signs of a transform, or as a random P; None where there is no subspace, or slices are picked."""
    if P in slots:
        return torch.linalg.qr(slots[P].float())[0], not linalg.tall(p)
    role = roles(slots, who)
    if role.basis:
        return slots[role.basis].float(), slots[role.basis].shape[-2] != min(p.shape[-2:])
    if not role.picks or not role.signs:
        return None
    short, size = min(p.shape[-2:]), slots[role.picks].shape[-1]
    like, stored = torch.zeros(short, short, device=p.device), {"index": slots[role.picks], "signs": slots[role.signs]}
    return projections.up(torch.eye(short, size, device=p.device), stored, like)[:size].mT, False


def check(name: str, p: Tensor, slots: Slots, who: RuleRecord) -> None:
    """Raises CheckpointError where slots cannot be those of p."""

    def refuse(slot: str, expected: str) -> CheckpointError:
        got = f"{tuple(slots[slot].shape)} {slots[slot].dtype}"
        return CheckpointError(f"state of {name} {tuple(p.shape)}: {slot} is {got}, expected {expected}")

    if ENTRIES in slots:
        t = slots[ENTRIES]
        if t.ndim != 1 or not in_range(t, p.numel()):
            raise refuse(ENTRIES, "positions in it")
    if P in slots and (p.ndim != 2 or slots[P].ndim != 2 or slots[P].shape[0] != p.shape[1]):
        raise refuse(P, "a row for each of its columns")
    like, index = moved(p, slots), roles(slots, who).picks
    for slot, t in slots.items():
        sort = kind(slot, t, who)
        if slot in (STEP, CORRECTION):
            expected = _no_clock(slot, t)
        elif slot == P:
            expected = "" if t.is_floating_point() else FLOAT
        else:
            expected = _no_positions(t, like) if slot == index else _unlike(sort, t, like)
        if expected:
            raise refuse(slot, expected)


def _unlike(sort: str, t: Tensor, like: Tensor) -> str:
    """What a slot of this kind should have been, of a tensor like that; "" where it may be one."""
    sides = like.shape[-2:] if like.ndim >= 2 else ()
    if sort in (Kind.FIRST, Kind.SECOND, Kind.WEIGHT) and not t.is_floating_point():
        return FLOAT
    if sort == Kind.WEIGHT and t.shape != like.shape:
        return f"{tuple(like.shape)}"
    if sort == Kind.BASIS and t.is_floating_point():
        if t.ndim < 2 or t.shape[-2] not in sides or t.shape[-1] > t.shape[-2]:
            return f"the rows of one of {tuple(sides)} and no more columns than rows"
    elif sort == Kind.BASIS and t.shape != (min(sides, default=0),):
        return "one for each of its shorter side"
    if sort == Kind.FIRST and (t.ndim != like.ndim or any(a > b for a, b in zip(t.shape, like.shape, strict=True))):
        return f"no larger than {tuple(like.shape)}"
    return ""


def _no_clock(slot: str, t: Tensor) -> str:
    """What a slot of the clock should have been."""
    if not t.is_floating_point():
        return FLOAT
    return "" if t.shape == ((2,) if slot == CORRECTION else ()) else "a pair" if slot == CORRECTION else "a number"


def _no_positions(index: Tensor, like: Tensor) -> str:
    """What an index of slices should have been."""
    sides = like.shape[-2:] if like.ndim >= 2 else ()
    if sides and index.ndim > 0 and index.dtype == torch.int64 and in_range(index, max(sides), -max(sides)):
        return ""
    return "positions on one of its sides"


def in_range(index: Tensor, size: int, least: int = 0) -> bool:
    """Whether these are whole numbers in [least, size), one at least."""
    whole = index.dtype in (torch.int32, torch.int64) and index.numel() > 0
    return whole and int(index.min()) >= least and int(index.max()) < size
