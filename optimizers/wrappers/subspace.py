"""A rule in a random subspace: for a weight W (out, in) it moves a B (out, r), and W by B Pᵀ. See `rso`."""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..contract import Hyper, Kind, Rule, Slot, Slots
from ..moments import Moments
from ..random import Key, normal, permutation
from .warmup import AGE, rising, unused

P, B = "P", "B"  # slots: the subspace, and what trains in the place of a weight


def draw(projection: str, key: Key, size: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """P (size, rank), float32, contiguous, with E P Pᵀ = I; a pure function of its arguments."""
    if torch.device(device).type == "meta":
        return torch.empty(size, rank, device=device)
    p: Tensor
    if projection == "coordinate":
        p = torch.zeros(size, rank, device=device)
        p[permutation(key, size, device)[:rank].sort().values, torch.arange(rank, device=device)] = sqrt(size / rank)
        return p
    g = normal(key, (size, rank), device)
    if projection == "gaussian":
        return g / sqrt(rank)
    q, r = torch.linalg.qr(g)
    p = (sqrt(size / rank) * q * r.diagonal().sign()).contiguous()  # without the signs it would not be uniform
    return p


@dataclass(frozen=True)
class Subspace:
    """Of what size a random subspace is and how it is stepped in, over the options of the inner rule."""

    rank: int
    form: str
    prox: float
    warmup: int
    decay: bool
    over: Any


def subspace(
    inner: Rule, rank: int, form: str = "merged", prox: float = 0.0, warmup: int = 0, decay: bool = True
) -> Rule:
    """`inner` on B (out, r) as a rule for W (out, in), whose gradient is dB: it moves W by rule(dB) Pᵀ, or B.

    Slots: `P` (in, r) in W's dtype; `B` (out, r) float32 where the form is "products" or `prox` (1/eta) is not 0; `age`
    (0-d float32), the steps since P was drawn, where the learning rate warms up over `warmup` of them; and those of
    `inner` for a B. Without `decay` the weight decay is taken to be 0, which saves a pass over W.
    """
    holds, inner_gradient = form == "products" or prox > 0, inner.gradient
    age = unused(AGE, [slot.name for slot in inner.slots])
    own = {P, B, age}

    def inside(slots: Slots) -> Slots:
        return {slot: t for slot, t in slots.items() if slot not in own}

    def init(p: Tensor) -> Slots:
        b = p.new_zeros(p.shape[0], rank, dtype=torch.float32)
        apart = {B: b} if holds else {}
        aged = {age: p.new_zeros((), dtype=torch.float32)} if warmup else {}
        return {P: p.new_zeros(p.shape[1], rank), **apart, **aged, **inner.init(b)}

    def inward(g: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        return (g.float() + prox * slots[B] if prox else g), inside(slots)

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        assert inner.refresh is not None
        new, ok = inner.refresh(*inward(g, slots), key, only_missing)
        return slots | new, ok

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        b = slots[B] if holds else p.new_zeros(()).expand(p.shape[0], rank)
        still: Hyper = {**hyper, "weight_decay": torch.zeros_like(hyper["weight_decay"])}
        aged: Slots = {}
        if warmup:
            aged = {age: slots[age] + 1}
            still = rising(still, aged[age], warmup)
        step, new = inner.update(*inward(g, slots), b, still)
        assert step is not None, f"{inner.name} moves its tensor"
        new = slots | new | aged | ({B: b + step} if holds else {})
        delta = step @ slots[P].float().T if form == "merged" else None
        if decay:
            shrink = -hyper["lr"] * hyper["weight_decay"] * p.float()
            delta = shrink if delta is None else delta + shrink
        return delta, new

    def export(slots: Slots, p: Tensor) -> Moments:
        assert inner.export is not None
        first, second, seen = inner.export(inside(slots), p.new_empty(p.shape[0], rank, dtype=torch.float32))
        basis = slots[P].float()
        if first is not None:  # the least G with G P = M
            first = torch.linalg.solve(basis.T @ basis, first.T).T @ basis.T
        if second is not None:  # E (G P)² = E G² P²: of a row its mean is known, no more
            second = (second.mean(-1, keepdim=True) * (rank / p.shape[1])).expand(p.shape).contiguous()
        return Moments(first, second, seen)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert inner.adopt is not None and moments.first is not None and moments.second is not None
        basis = slots[P].float()
        given = Moments(moments.first @ basis, moments.second @ basis.square(), moments.seen)
        new, did = inner.adopt(given, inside(slots), p.new_empty(p.shape[0], rank, dtype=torch.float32), key)
        return slots | new, f"into a random subspace, {did}"

    apart = (Slot(B, Kind.WEIGHT),) if holds else ()
    aged = (Slot(age, Kind.COUNTER),) if warmup else ()
    return replace(
        inner,
        name=f"rso {inner.name}",
        options=Subspace(rank, form, prox, warmup, decay, inner.options),
        slots=(Slot(P, Kind.BASIS, given=True), *apart, *aged, *inner.slots),
        gradient=lambda g, slots: inner_gradient(g @ slots[P].float(), slots),
        product=(lambda slots: slots[B] @ slots[P].float().T) if form == "products" else None,
        init=init,
        update=update,
        refresh=refresh if inner.refresh else None,
        export=export if inner.export else None,
        adopt=adopt if inner.adopt else None,
        elementwise=False,
    )
