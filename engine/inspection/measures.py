"""What can be said of an optimizer's state, one parameter at a time: which rule, how large, how it is doing.

A measure that means nothing for a parameter (the rank of a vector, the orthogonality of no basis) is left out; one
that cannot be told (a moment of zeros, an infinity in it) is NaN. `MEASURES` says what each is.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers import linalg
from optimizers.apply import add
from optimizers.contract import Group, Kind, Params, Slots, State
from optimizers.linalg import projections
from optimizers.random import Key
from optimizers.state import Parked
from optimizers.wrappers.choice import TURN_WARMUP
from optimizers.wrappers.warmup import AGE

from ..checkpoint.rules import RuleRecord, described
from ..checkpoint.tensorfile import CheckpointError

EXACT = 512  # the shorter side up to which all singular values are computed; beyond, the leading ones
LEADING = 64  # at most so many
KINDS = ("weights", *Kind, "other state")
COUNTS = ("elements", "active", "parked", "tensors", "active_tensors", "parked_tensors")
USUAL = {  # where a head does not say what slots are there for
    **dict.fromkeys(("exp_avg", "momentum_buffer"), Kind.FIRST),
    "exp_avg_sq": Kind.SECOND,
    **dict.fromkeys(("basis", "signs", "P"), Kind.BASIS),
    **dict.fromkeys(("step", "bias_correction"), Kind.COUNTER),
    "B": Kind.WEIGHT,
}

MEASURES = {
    "weight_rms": "root mean square of the weights",
    "update_rms": "root mean square of the update that the moments stand for, lr m / (sqrt(v) + eps) + lr wd w (AdamW)",
    "turn_rate": "share of the learning rate that a parameter has this far into its turn (--turn-warmup)",
    "update_lost": "share of that update's entries that rounding to nearest undoes (bf16 weights)",
    "basis_error": "Frobenius norm of Q^T Q - I",
    "first_rms": "root mean square of the first moment, as it is stored",
    "first_stable_rank": "||M||^2 / s1^2 of the first moment, s1 its largest singular value: how many directions count",
    "first_leading": f"share of ||M||^2 in its leading quarter of directions, of {LEADING} at most",
    "second_stable_rank": "the same ratio of the second moment: near 1, a row and a column say it all",
    "first_captured": "||Q^T M||^2 / ||M||^2: share of the first moment inside the basis, where it is kept outside too",
    "change": "||W' - W|| / ||W||, between two checkpoints",
    "change_rms": "root mean square of W' - W, by the steps in between",
    "change_captured": "||Q'^T (W' - W)||^2 / ||W' - W||^2: share of the change inside the newer basis",
    "overlap": "||Q^T Q'||^2 / r: 1 is the same subspace, r / side what two random ones share",
    "moment_captured": "||Q'^T Q M||^2 / ||M||^2: share of the older first moment that the newer basis can hold",
}


class Slot(NamedTuple):
    """One tensor of state."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class Look(NamedTuple):
    """What is known of one parameter. `spectra` are leading singular values, by slot, largest first."""

    name: str
    who: RuleRecord
    status: str  # "active", "parked" (frozen, its state kept), "frozen" (no state)
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    active: int  # elements that are trained now
    slots: list[Slot]
    rank: int | None
    measures: dict[str, float]
    spectra: dict[str, list[float]]


# One tensor.


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt()) if x.numel() else math.nan


def spectrum(x: Tensor) -> Tensor:
    """Singular values (..., k), largest first: all where the shorter side is small, else the leading ones, of which
    a randomized range finder underestimates the last by some percent. NaN where x is not finite."""
    x, short = x.float(), min(x.shape[-2:])
    if not x.isfinite().all():
        return x.new_full((*x.shape[:-2], min(short, LEADING)), math.nan)
    if short > EXACT:
        x = linalg.project(x, linalg.range_basis(x, LEADING, Key(0), oversample=LEADING, power=2))
    values: Tensor = torch.linalg.svdvals(x)
    return values


def stable_rank(values: Tensor, squared: Tensor) -> float:
    """||X||^2 / s1^2 from X's singular values and its squared norm; the mean over a batch."""
    return float((squared / values[..., 0].square()).mean())


def leading(values: Tensor, squared: Tensor, side: int) -> float:
    """The share of ||X||^2 in the leading quarter of the directions of its shorter side."""
    k = max(1, min(side // 4, LEADING))
    return float((values[..., :k].square().sum(-1) / squared).mean())


def basis_error(q: Tensor) -> float:
    """||Q^T Q - I||, the largest of a batch."""
    q = q.float()
    gap = q.mT @ q - torch.eye(q.shape[-1], device=q.device)
    return float(gap.square().sum((-2, -1)).sqrt().max())


def subspace(slots: Slots, p: Tensor) -> tuple[Tensor, bool] | None:
    """(Q (..., side, r) with orthonormal columns, whether it lies on p's longer side), also where it is stored as
    indices and signs of a transform, or as a random P; None where there is no subspace, or slices are picked."""
    if "P" in slots:
        return torch.linalg.qr(slots["P"].float())[0], not linalg.tall(p)
    if "basis" in slots:
        return slots["basis"].float(), slots["basis"].shape[-2] != min(p.shape[-2:])
    if "index" not in slots or "signs" not in slots:
        return None
    short, rank = min(p.shape[-2:]), slots["index"].shape[-1]
    like = torch.zeros(short, short, device=p.device)
    return projections.up(torch.eye(short, rank, device=p.device), slots, like)[:rank].mT, False


def overlap(old: Slots, new: Slots, p: Tensor) -> float | None:
    """||Q^T Q'||^2 / r of two subspaces, the mean over a batch; of picked slices, the share picked by both."""
    (a, b), index = (subspace(slots, p) for slots in (old, new)), [slots.get("index") for slots in (old, new)]
    if a is not None and b is not None and a[0].shape == b[0].shape:
        return float((a[0].mT @ b[0]).square().sum((-2, -1)).mean()) / a[0].shape[-1]
    if a is None and b is None and index[0] is not None and index[1] is not None and index[0].shape == index[1].shape:
        return float((index[0].unsqueeze(-1) == index[1].unsqueeze(-2)).any(-1).float().mean())
    return None


def captured(x: Tensor, q: Tensor, other: bool) -> float:
    """||Q^T X||^2 / ||X||^2, Q on X's shorter side, or the `other`."""
    x = x.float()
    return float(linalg.project(x, q, other).square().sum() / x.square().sum())


def adamw_update(slots: Slots, p: Tensor, who: RuleRecord) -> Tensor | None:
    """The update that AdamW's moments ask for, with its decay, before rounding; None for another rule, or too early."""
    eps, fits = who.options.get("eps"), all(slots.get(name, p).shape == p.shape for name in ("exp_avg", "exp_avg_sq"))
    if (
        who.rule != "adamw"
        or not isinstance(eps, float)
        or not {"exp_avg", "exp_avg_sq", "bias_correction"} <= set(slots)
    ):
        return None
    c1, c2 = slots["bias_correction"].tolist()
    if not fits or not c1 or not c2:
        return None
    factor = slots["scale"].item() if "scale" in slots and who.options.get("mode") == "update" else 1.0
    rate = turn_rate(slots, who)
    factor *= 1.0 if rate is None else rate
    size: Tensor = (slots["exp_avg"] / c1) / ((slots["exp_avg_sq"] / c2).sqrt() + eps)
    delta: Tensor = -factor * who.lr * (size + who.weight_decay * p.float())
    return delta


def turn_rate(slots: Slots, who: RuleRecord) -> float | None:
    """What the outermost mask made of the learning rate at the last step; None where it does not rise in a turn."""
    steps, ages = who.options.get(TURN_WARMUP), [slot for slot in slots if re.fullmatch(rf"{AGE}\d*", slot)]
    return min(slots[max(ages)].item() / steps, 1.0) if ages and isinstance(steps, int) else None


# One parameter.


def kind(name: str, t: Tensor, who: RuleRecord) -> str:
    """What a slot is there for: as its rule declares it, else by its usual name."""
    declared = who.kinds.get(name, USUAL.get(name))
    if declared is not None:
        return str(declared)
    if t.ndim == 0:
        return str(Kind.COUNTER)
    return "other state" if t.is_floating_point() else str(Kind.INDEX)


def first_of(slots: Slots, who: RuleRecord, sort: Kind) -> str:
    """The first slot of a kind, or an empty name."""
    return next((name for name, t in slots.items() if kind(name, t, who) == sort), "")


def moved(p: Tensor, slots: Slots) -> Tensor:
    """What the slots are of: p; the entries of it that train now; or the B that moves it, out of its values."""
    if "entries" in slots:
        return p.flatten()[slots["entries"].long()]
    return p.new_zeros(p.shape[0], slots["P"].shape[-1]) if "P" in slots else p


def check(name: str, p: Tensor, slots: Slots, who: RuleRecord) -> None:
    """Raises CheckpointError where slots cannot be those of p."""

    def refuse(slot: str, expected: str) -> CheckpointError:
        got = f"{tuple(slots[slot].shape)} {slots[slot].dtype}"
        return CheckpointError(f"state of {name} {tuple(p.shape)}: {slot} is {got}, expected {expected}")

    if "entries" in slots:
        t = slots["entries"]
        if t.ndim != 1 or not in_range(t, p.numel()):
            raise refuse("entries", "positions in it")
    if "P" in slots and (p.ndim != 2 or slots["P"].ndim != 2 or slots["P"].shape[0] != p.shape[1]):
        raise refuse("P", "a row for each of its columns")
    like = moved(p, slots)
    sides = like.shape[-2:] if like.ndim >= 2 else ()
    for slot, t in slots.items():
        sort = kind(slot, t, who)
        moment = sort in (Kind.FIRST, Kind.SECOND)
        if (moment or slot in ("basis", "P", "B", "step", "bias_correction")) and not t.is_floating_point():
            raise refuse(slot, "floating point")
        if slot in ("step", "bias_correction") and t.shape != ((2,) if slot == "bias_correction" else ()):
            raise refuse(slot, "a pair" if slot == "bias_correction" else "a number")
        if slot == "B" and t.shape != like.shape:
            raise refuse(slot, f"{tuple(like.shape)}")
        if slot == "basis" and (t.ndim < 2 or t.shape[-2] not in sides or t.shape[-1] > t.shape[-2]):
            raise refuse(slot, f"the rows of one of {tuple(sides)} and no more columns than rows")
        if sort == Kind.FIRST and (t.ndim != like.ndim or any(a > b for a, b in zip(t.shape, like.shape, strict=True))):
            raise refuse(slot, f"no larger than {tuple(like.shape)}")
        if slot == "signs" and t.shape != (min(sides, default=0),):
            raise refuse(slot, "one for each of its shorter side")
        fits = bool(sides) and t.ndim > 0 and (slot != "index" or in_range(t, max(sides), -max(sides)))
        if slot == "index" and (t.dtype != torch.int64 or not fits):
            raise refuse(slot, "positions on one of its sides")


def in_range(index: Tensor, size: int, least: int = 0) -> bool:
    """Whether these are whole numbers in [least, size), one at least."""
    whole = index.dtype in (torch.int32, torch.int64) and index.numel() > 0
    return whole and int(index.min()) >= least and int(index.max()) < size


def look(name: str, p: Tensor, slots: Slots | None, who: RuleRecord, rounded: bool = True) -> Look:
    """One parameter and its slots, None where it has no state. `rounded`: updates are rounded to nearest. Of a p
    without memory (device "meta") there is nothing to measure.

    Raises CheckpointError where the slots cannot be its own.
    """
    status = "frozen" if slots is None else "parked" if isinstance(slots, Parked) else "active"
    p, slots = p.detach(), slots or {}
    measures, spectra = ({}, {}) if p.is_meta else measured(name, p, slots, who, rounded)
    rank = next((slots[slot].shape[-1] for slot in ("P", "basis", "index") if slot in slots), None)
    held = [Slot(s, kind(s, t, who), tuple(t.shape), _dtype(t), t.numel() * t.element_size()) for s, t in slots.items()]
    size, active = p.numel() * p.element_size(), 0
    if status == "active":
        active = slots["entries"].numel() if "entries" in slots else p.numel()
    return Look(name, who, status, tuple(p.shape), _dtype(p), size, active, held, rank, measures, spectra)


def measured(
    name: str, p: Tensor, slots: Slots, who: RuleRecord, rounded: bool
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The measures and spectra of one parameter. Raises CheckpointError where the slots cannot be its own."""
    check(name, p, slots, who)
    like = moved(p, slots)
    measures, spectra = {"weight_rms": rms(whole(p, slots, who))}, {}
    first, second = (first_of(slots, who, sort) for sort in (Kind.FIRST, Kind.SECOND))
    for prefix, slot in (("first", first), ("second", second)):
        if slot not in slots:
            continue
        x = slots[slot].float()
        if prefix == "first":
            measures["first_rms"] = rms(x)
        if x.ndim >= 2 and min(x.shape) > 0 and min(x.shape[-2:]) > 1:
            unit = linalg.unit(x)  # ratios do not depend on the size, but squares of small numbers vanish
            values, squared = spectrum(x / unit), (x / unit).square().sum((-2, -1))
            measures[f"{prefix}_stable_rank"] = stable_rank(values, squared)
            if prefix == "first":
                measures["first_leading"] = leading(values, squared, min(x.shape[-2:]))
            spectra[slot] = (values * unit[..., 0]).reshape(-1, values.shape[-1]).mean(0)[:LEADING].tolist()
    if "basis" in slots:
        q = slots["basis"].float()
        if q.any():  # zeros stand for a basis until a gradient gives one
            measures["basis_error"] = basis_error(q)
        if first and slots[first].shape == like.shape and q.shape[-1] < q.shape[-2]:
            measures["first_captured"] = captured(slots[first], q, q.shape[-2] != min(like.shape[-2:]))
    if (rate := turn_rate(slots, who)) is not None:
        measures["turn_rate"] = rate
    if (delta := adamw_update(slots, like, who)) is not None:
        measures["update_rms"] = rms(delta)
        if p.dtype == torch.bfloat16 and rounded and (moving := delta != 0).any():
            measures["update_lost"] = float(((add(like, delta) == like) & moving).sum() / moving.sum())
    return measures, spectra


def whole(p: Tensor, slots: Slots, who: RuleRecord) -> Tensor:
    """The weight that the model has, float32: with the product that a rule keeps beside it."""
    apart = who.options.get("form") == "products" and "B" in slots and "P" in slots
    return p.float() + slots["B"].float() @ slots["P"].float().T if apart else p.float()


def compared(
    old: tuple[Tensor, Slots, RuleRecord], new: tuple[Tensor, Slots, RuleRecord], steps: int
) -> dict[str, float]:
    """Measures of one parameter between two checkpoints, `steps` apart. Both were looked at: their slots fit."""
    (p, before), (q, after) = ((whole(*one), one[1]) for one in (old, new))
    change = q - p
    measures = {"change": float(change.norm() / p.norm()), "change_rms": rms(change) / max(steps, 1)}
    if p.ndim < 2 or "entries" in {**before, **after}:
        return measures
    like = moved(p, before)
    if "P" in before or like.shape == moved(p, after).shape:
        shared = overlap(before, after, like if "P" not in before else p)
        if shared is not None:
            measures["overlap"] = shared
    newest = subspace(after, p)
    if newest is not None and newest[0].shape[-2] in p.shape[-2:]:
        measures["change_captured"] = captured(change, *newest)
        oldest, first = subspace(before, p), before.get(first_of(before, old[2], Kind.FIRST))
        in_both = oldest if "basis" in before and oldest is not None and oldest[1] == newest[1] else None
        if in_both and first is not None and first.shape == linalg.project(p, *in_both).shape:  # its coordinates
            measures["moment_captured"] = captured(linalg.lift(first.float(), in_both[0], p, in_both[1]), *newest)
    return measures


# A whole model, in numbers for a curve.


def counts(looks: Iterable[Look]) -> dict[str, dict[str, int]]:
    """By rule: elements in all, trained now, parked; and the number of tensors in each of the three."""
    found: dict[str, dict[str, int]] = {}
    for one in looks:
        own = found.setdefault(one.who.rule, dict.fromkeys(COUNTS, 0))
        size = math.prod(one.shape)
        parked = one.status == "parked"
        for key, amount in zip(
            COUNTS, (size, one.active, size * parked, 1, one.status == "active", parked), strict=True
        ):
            own[key] += amount
    return found


def summary(looks: Iterable[Look]) -> dict[str, float]:
    """`<rule>/<measure>`: the mean over the rule's parameters (the largest basis error), and the active share of its
    elements. What is NaN for one parameter is left out."""
    looks = list(looks)
    gathered: dict[str, list[float]] = {}
    for one in looks:
        for measure, value in one.measures.items():
            if not math.isnan(value):
                gathered.setdefault(f"{one.who.rule}/{measure}", []).append(value)
    scalars = {
        name: max(values) if name.endswith("/basis_error") else sum(values) / len(values)
        for name, values in gathered.items()
    }
    for rule, elements in counts(looks).items():
        scalars[f"{rule}/active_share"] = elements["active"] / max(elements["elements"], 1)
    return scalars


@torch.no_grad()
def scalars(params: Params, state: State, owner: Mapping[str, Group], factor: float, rounded: bool) -> dict[str, float]:
    """`summary` of a model in training, as `optim/<rule>/<measure>`, a parameter at a time."""
    looks = []
    for name, p in params.items():
        if name not in owner:  # frozen
            continue
        looks.append(look(name, p, state.get(name), described(owner[name], factor), rounded)._replace(spectra={}))
    return {f"optim/{name.replace(' ', '-')}": value for name, value in summary(looks).items()}


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
