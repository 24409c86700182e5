"""What can be said of an optimizer's state, one parameter at a time: which rule, how large, how it is doing.

A measure that means nothing for a parameter (the rank of a vector, the orthogonality of no basis) is left out; one
that cannot be told (a moment of zeros, an infinity in it) is NaN. `MEASURES` says what each is.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from optimizers import linalg
from optimizers.apply import add
from optimizers.clock import CORRECTION
from optimizers.contract import Slots
from optimizers.state import Parked
from optimizers.storage.last_bits import LAST_BITS
from optimizers.storage.slots import SCALE, decoded, unfit
from optimizers.wrappers.choice import TURN_WARMUP
from optimizers.wrappers.masked import ENTRIES
from optimizers.wrappers.subspace import B, P
from optimizers.wrappers.warmup import AGE

from ..checkpoint.rules import RuleRecord
from ..checkpoint.tensorfile import CheckpointError
from .matrices import LEADING, basis_error, captured, leading, rms, spectrum, stable_rank
from .slots import check, kind, moved, rank, roles, subspace

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


def adamw_update(slots: Slots, p: Tensor, who: RuleRecord) -> Tensor | None:
    """The update that AdamW's moments ask for, with its decay, before rounding; None for another rule, or too early."""
    eps, role = who.options.get("eps"), roles(slots, who)
    moments = [slots[name] for name in (role.first, role.second) if name]
    if who.rule != "adamw" or not isinstance(eps, float) or len(moments) < 2 or CORRECTION not in slots:
        return None
    c1, c2 = slots[CORRECTION].tolist()
    if any(moment.shape != p.shape for moment in moments) or not c1 or not c2:
        return None
    factor = slots["scale"].item() if "scale" in slots and who.options.get("mode") == "update" else 1.0
    rate = turn_rate(slots, who)
    factor *= 1.0 if rate is None else rate
    size: Tensor = (moments[0] / c1) / ((moments[1] / c2).sqrt() + eps)
    delta: Tensor = -factor * who.lr * (size + who.weight_decay * p.float())
    return delta


def turn_rate(slots: Slots, who: RuleRecord) -> float | None:
    """What the outermost mask made of the learning rate at the last step; None where it does not rise in a turn."""
    steps, ages = who.options.get(TURN_WARMUP), [slot for slot in slots if re.fullmatch(rf"{AGE}\d*", slot)]
    return min(slots[max(ages)].item() / steps, 1.0) if ages and isinstance(steps, int) else None


def look(name: str, p: Tensor, slots: Slots | None, who: RuleRecord, rounded: bool = True) -> Look:
    """One parameter and its slots, None where it has no state. `rounded`: updates are rounded to nearest. Of a p
    without memory (device "meta") there is nothing to measure.

    Raises CheckpointError where the slots cannot be its own.
    """
    status = "frozen" if slots is None else "parked" if isinstance(slots, Parked) else "active"
    p, slots = p.detach(), slots or {}
    held = [Slot(s, kind(s, t, who), tuple(t.shape), _dtype(t), t.numel() * t.element_size()) for s, t in slots.items()]
    if odd := unfit(slots):
        got = f"{tuple(slots[odd].shape)} {slots[odd].dtype} with scales {tuple(slots[odd + SCALE].shape)}"
        raise CheckpointError(f"state of {name} {tuple(p.shape)}: {odd} is {got}, which do not go together")
    slots = decoded(slots)
    measures, spectra = ({}, {}) if p.is_meta else measured(name, p, slots, who, rounded)
    size, active = p.numel() * p.element_size(), 0
    if status == "active":
        active = slots[ENTRIES].numel() if ENTRIES in slots else p.numel()
    own = rank(slots, who)
    return Look(name, who, status, tuple(p.shape), _dtype(p), size, active, held, own, measures, spectra)


def measured(
    name: str, p: Tensor, slots: Slots, who: RuleRecord, rounded: bool
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The measures and spectra of one parameter. Raises CheckpointError where the slots cannot be its own."""
    check(name, p, slots, who)
    like, role = moved(p, slots), roles(slots, who)
    measures, spectra = {"weight_rms": rms(whole(p, slots, who))}, {}
    for prefix, slot in (("first", role.first), ("second", role.second)):
        if not slot:
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
    if role.basis:
        q, first = slots[role.basis].float(), role.first
        if q.any():  # zeros stand for a basis until a gradient gives one
            measures["basis_error"] = basis_error(q)
        if first and slots[first].shape == like.shape and q.shape[-1] < q.shape[-2]:
            measures["first_captured"] = captured(slots[first], q, q.shape[-2] != min(like.shape[-2:]))
    if (rate := turn_rate(slots, who)) is not None:
        measures["turn_rate"] = rate
    if (delta := adamw_update(slots, like, who)) is not None:
        measures["update_rms"] = rms(delta)
        if p.dtype == torch.bfloat16 and rounded and LAST_BITS not in slots and (moving := delta != 0).any():
            measures["update_lost"] = float(((add(like, delta) == like) & moving).sum() / moving.sum())
    return measures, spectra


def whole(p: Tensor, slots: Slots, who: RuleRecord) -> Tensor:
    """The weight that the model has, float32: with the product that a rule keeps beside it."""
    apart = who.options.get("form") == "products" and B in slots and P in slots
    return p.float() + slots[B].float() @ slots[P].float().T if apart else p.float()


def overlap(old: Slots, new: Slots, p: Tensor, was: RuleRecord, now: RuleRecord) -> float | None:
    """||Q^T Q'||^2 / r of two subspaces, the mean over a batch; of picked slices, the share picked by both."""
    a, b = subspace(old, p, was), subspace(new, p, now)
    index = [slots.get(roles(slots, who).picks) for slots, who in ((old, was), (new, now))]
    if a is not None and b is not None and a[0].shape == b[0].shape:
        return float((a[0].mT @ b[0]).square().sum((-2, -1)).mean()) / a[0].shape[-1]
    if a is None and b is None and index[0] is not None and index[1] is not None and index[0].shape == index[1].shape:
        return float((index[0].unsqueeze(-1) == index[1].unsqueeze(-2)).any(-1).float().mean())
    return None


def compared(
    old: tuple[Tensor, Slots, RuleRecord], new: tuple[Tensor, Slots, RuleRecord], steps: int
) -> dict[str, float]:
    """Measures of one parameter between two checkpoints, `steps` apart. Both were looked at: their slots fit."""
    old, new = ((p, decoded(slots), who) for p, slots, who in (old, new))
    (p, before), (q, after) = ((whole(*one), one[1]) for one in (old, new))
    change = q - p
    measures = {"change": float(change.norm() / p.norm()), "change_rms": rms(change) / max(steps, 1)}
    if p.ndim < 2 or ENTRIES in {**before, **after}:
        return measures
    like = moved(p, before)
    if P in before or like.shape == moved(p, after).shape:
        shared = overlap(before, after, like if P not in before else p, old[2], new[2])
        if shared is not None:
            measures["overlap"] = shared
    newest = subspace(after, p, new[2])
    if newest is not None and newest[0].shape[-2] in p.shape[-2:]:
        measures["change_captured"] = captured(change, *newest)
        role, oldest = roles(before, old[2]), subspace(before, p, old[2])
        first = before.get(role.first)
        in_both = oldest if role.basis and oldest is not None and oldest[1] == newest[1] else None
        if in_both and first is not None and first.shape == linalg.project(p, *in_both).shape:  # its coordinates
            measures["moment_captured"] = captured(linalg.lift(first.float(), in_both[0], p, in_both[1]), *newest)
    return measures


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
