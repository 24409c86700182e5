"""OMGD: Yang, Ren, Jiang, Wan & Peng, "Omni-Masked Gradient Descent: Memory-Efficient Optimization via Mask Traversal
with Improved Convergence", arXiv 2603.05960; and LISA (Pan et al., arXiv 2403.17919), which draws with replacement.

    every cycle    draw masks S_1 ... S_M with  sum_j S_j = M 1                            (3)
    for j = 1 ... M, for each batch of a pass over the data            epochwise; or the pairs (j, batch) shuffled
        g <- S_j (.) grad f(W; batch);   W <- base(W, g)               on what S_j keeps; the rest stands still

S_j is M on what it keeps; what is in no group is always kept, at scale 1. Over any rule: a tensor that is frozen has no
gradient, no update, no decay, no clock; bias correction counts its own active steps.

Where this differs. The paper says nothing of state; its memory table implies "drop", the default here: moments of
what leaves are freed and start anew. The authors' code does "keep", and so holds all moments after one cycle.
Layers left over get a mask of their own, at scale ceil(N / active) like the rest; Algorithm 2 (`remainder="reset"`)
skips them, at scale N / active, which breaks (3). The scale multiplies gradients after clipping; under Adam's rules it
all but cancels, so `scale_mode="update"` (ours) multiplies updates, decay included. Algorithm 1's order of pairs is
"joint"; it needs "keep" and saves no memory. The paper's experiments, and the default here, are epochwise.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..contract import PARKED, Group, Hyper, Kind, Optimizer, Params, Rule, Slot, Slots, State, UsageError, bare, part
from ..moments import Moments
from ..partition import blank
from ..random import Key
from .traversal import Traversal, write

Policy = Literal["drop", "keep", "offload"]
ScaleMode = Literal["grad", "none", "update"]


def omgd(
    base: Optimizer, params: Params, masks: Traversal, scale_mode: ScaleMode = "grad", state_policy: Policy = "drop"
) -> Optimizer:
    """`base`, with only what the current mask keeps being trained. State: as `base`'s for what is active.

    A masked tensor has a slot `scale` more (0-d float32; not with scale_mode "none"). Where masks choose coordinates it
    has `entries` too (int32 (k,), positions in the flattened tensor), and its other slots are those of a vector (k,).
    "keep" and "offload" (to the host) hold a frozen tensor's slots under `PARKED` + name, all of them from the start.
    A basis that is fresh, or fell due while its tensor was frozen, is rebuilt at the tensor's first step.

    Inside a segment every set of active tensors is a graph of its own: compile layers and coordinates, not tensors.
    Raises UsageError for what cannot be combined, and names the tensor that a rule cannot serve.
    """
    if masks.order == "joint" and state_policy != "keep":
        raise UsageError(
            f"omgd: order 'joint' changes the mask every step; got state_policy {state_policy!r}, expected 'keep'"
        )
    if "traversal" in base.metadata and {state_policy, base.metadata.get("state_policy")} != {"drop"}:
        raise UsageError(
            f"omgd: masks over masks drop the state of what is frozen; got state_policy {state_policy!r} over "
            f"{base.metadata.get('state_policy')!r}, expected 'drop' for both"
        )
    compact = masks.groups.kind == "coordinates"
    grouped = {name: i for i, names in enumerate(masks.groups.names) for name in names if name in base.owner}
    inner: dict[str, Group] = {}
    rules: dict[Rule, Rule] = {}  # one a rule, so that all layers share a kernel
    held = {slot.name for name in grouped for slot in base.owner[name].rule.slots}
    own = "scale" if "scale" not in held else f"scale{sum(slot.startswith('scale') for slot in held) + 1}"
    for name in grouped:
        group = base.owner[name]
        if compact and any(slot.given for slot in group.rule.slots):
            raise UsageError(
                f"{name}: masks of coordinates are for plain rules, got {group.rule.name} under another wrapper; mask "
                "layers or tensors"
            )
        if group.rule not in rules:
            rules[group.rule] = group.rule if scale_mode == "none" else scaled(group.rule, scale_mode, own)
        inner[name] = group._replace(rule=rules[group.rule])
    owner: dict[str, Group] = {**base.owner, **inner}
    if compact:
        gathers = {rule: gathered(rule, masks.masks) for rule in rules.values()}
        for name, group in inner.items():
            _check_coordinates(name, params[name], group.rule, masks, state_policy)
            owner[name] = group._replace(rule=gathers[group.rule])

    def active(step: int) -> set[str]:
        return {name for i in masks.active(step) for name in masks.groups.names[i] if name in grouped}

    def marked(slots: Slots, p: Tensor, step: int) -> Slots:
        if scale_mode == "none":
            return slots
        return {**slots, own: p.new_full((), 1.0 if step < masks.warmup else masks.scale, dtype=torch.float32)}

    def fresh(name: str, p: Tensor, step: int) -> State:
        if not compact:
            made = base.init({name: p}, step + 1)
        else:
            entries = masks.entries(name, p.numel(), step).to(p.device)
            (slots,) = base.init({name: p.detach().flatten()[: len(entries)]}).values()
            made = {name: {**slots, "entries": entries}}
        return {where: marked(slots, p, step) for where, slots in made.items()}

    def park(state: State) -> State:
        """Slots of what leaves; what it added to the weight was merged, so nothing is left of that."""
        parked = {}
        for key, slots in state.items():
            still = owner[bare(key)].rule.names(Kind.WEIGHT)
            kept = {slot: torch.zeros_like(t) if slot in still else t for slot, t in slots.items()}
            if state_policy == "offload":
                kept = {slot: _hosted(t) for slot, t in kept.items()}
            parked[PARKED + key] = kept
        return parked

    def init(params: Params, step: int = 0) -> State:
        state = base.init({n: p for n, p in params.items() if n not in grouped}, step)
        last = max(step - 1, 0)  # a mask is switched before its first step, not after another's last
        now = active(last)
        for name, p in params.items():
            if name in grouped and name in now:
                state |= fresh(name, p, last)
            elif name in grouped and state_policy != "drop":
                state |= park(fresh(name, p, last))
        return ordered(state, params)

    def switch(params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        params, new = dict(params), dict(state)
        now, before = active(step), active(step - 1)
        for name in [name for name in params if name in grouped and name in before - now]:
            left = {where: new.pop(where) for where in part(new, [name])}
            params |= base.merge({name: params[name]}, left)
            if state_policy != "drop":
                new |= park(left)
        if base.switches(step):
            staying = {name: p for name, p in params.items() if name not in grouped or name in now & before}
            old = {where: new.pop(where) for where in part(new, staying)}
            moved, switched = base.switch(staying, old, step, key)
            params |= moved
            new |= switched
        for name, p in [(name, p) for name, p in params.items() if name in grouped and name in now]:
            if compact and masks.switches(step):
                new |= fresh(name, p, step)
            elif name not in before:
                back = {where.removeprefix(PARKED): new.pop(where) for where in part(new, [name])}
                if back:
                    back = {k: {n: t.to(p.device, non_blocking=True) for n, t in v.items()} for k, v in back.items()}
                    since = next((t for t in range(step, 0, -1) if name in active(t - 1)), 0)
                    for missed in filter(base.switches, range(since, step + 1)):  # what changed while it was away
                        moved, back = base.switch({name: params[name]}, back, missed, key)
                        params |= moved
                else:
                    back = fresh(name, p, step)
                new |= back
            new |= {where: marked(slots, p, step) for where, slots in part(new, [name]).items()}
        return params, ordered(new, params)

    def due(step: int) -> tuple[str, ...]:
        names = dict.fromkeys(base.due(step))
        if masks.switches(step) and not compact:
            new = {n for n in active(step) - active(step - 1) if owner[n].rule.refresh}
            if state_policy == "drop":
                return tuple(names | dict.fromkeys(sorted(new)))
            for t in range(step - 1, -1, -1):  # ends within a gap: until then each has been active, or due
                new -= active(t)
                if not new:
                    break
                late = new.intersection(base.due(t))
                names |= dict.fromkeys(sorted(late))
                new -= late
        return tuple(names)

    def switches(step: int) -> bool:
        return masks.switches(step) or base.switches(step)

    metadata = {"traversal": write(masks), "scale_mode": scale_mode, "state_policy": state_policy}
    return base._replace(
        owner=owner,
        init=init,
        due=due,
        switches=switches,
        switch=switch,
        batch=lambda step: base.batch(masks.batch(step)),
        metadata={f"over.{k}" if k in metadata else k: v for k, v in base.metadata.items()} | metadata,
    )


@dataclass(frozen=True)
class Scaled:
    """How a mask's scale is used, over the options of a rule."""

    mode: Literal["grad", "update"]
    over: Any


@dataclass(frozen=True)
class Gathered:
    """Into how many masks a tensor's entries are split, over the options of a rule."""

    masks: int
    over: Any


def _hosted(t: Tensor) -> Tensor:
    """The tensor on the host, pinned where it comes from a CUDA device; one without memory as it is."""
    if t.is_meta:
        return t
    return t.cpu().pin_memory() if t.is_cuda else t.cpu()


def scaled(rule: Rule, mode: Literal["grad", "update"], own: str = "scale") -> Rule:
    """`rule` with its gradient, or its update, multiplied by its `own` slot."""
    apart = rule.names(Kind.WEIGHT)

    def inside(slots: Slots) -> Slots:
        return {slot: t for slot, t in slots.items() if slot != own}

    def init(p: Tensor) -> Slots:
        return {**rule.init(p), own: p.new_ones((), dtype=torch.float32)}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        scale = slots[own]
        delta, new = rule.update(g.float() * scale if mode == "grad" else g, inside(slots), p, hyper)
        if mode == "update":
            delta = delta * scale if delta is not None else None
            new = new | {slot: slots[slot] + scale * (new[slot] - slots[slot]) for slot in apart}
        return delta, {**new, own: scale}

    def times(moments: Moments, factor: Tensor) -> Moments:
        if mode == "update":
            return moments
        first, second, seen = moments
        return Moments(None if first is None else first * factor, None if second is None else second * factor**2, seen)

    def export(slots: Slots, p: Tensor) -> Moments:
        assert rule.export is not None
        return times(rule.export(inside(slots), p), 1 / slots[own])

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert rule.adopt is not None
        new, did = rule.adopt(times(moments, slots[own]), inside(slots), p, key)
        return {**new, own: slots[own]}, did

    return replace(
        rule,
        options=Scaled(mode, rule.options),
        slots=(*rule.slots, Slot(own, Kind.COUNTER, given=True)),
        init=init,
        update=update,
        export=export if rule.export else None,
        adopt=adopt if rule.adopt else None,
    )


def gathered(rule: Rule, masks: int) -> Rule:
    """`rule` on the `entries` (int32 (k,)) of a tensor alone: state holds k entries, the others stay as they are."""

    def init(p: Tensor) -> Slots:
        entries = torch.arange(p.numel() // masks, dtype=torch.int32, device=p.device)
        return {**rule.init(p.detach().flatten()[: len(entries)]), "entries": entries}

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        entries = slots["entries"]
        where = entries.long()
        own = {slot: t for slot, t in slots.items() if slot != "entries"}
        delta, new = rule.update(g.flatten()[where], own, p.flatten()[where], hyper)
        if delta is not None:
            still = delta.new_full((p.numel(),), -0.0)  # x + -0 is x for every x, 0 would change -0
            delta = still.scatter(0, where, delta).view(p.shape)
        return delta, {**new, "entries": entries}

    slots = (*rule.slots, Slot("entries", Kind.INDEX, given=True))
    return Rule(rule.name, Gathered(masks, rule.options), slots, init, update)


def ordered(state: State, params: Params) -> State:
    """The state in the order of the parameters, whatever is parked after what is not."""
    place = {name: i for i, name in enumerate(params)}
    return {key: state[key] for key in sorted(state, key=lambda key: (place[bare(key)], len(key)))}


def _check_coordinates(name: str, p: Tensor, rule: Rule, masks: Traversal, policy: Policy) -> None:
    if rule.refresh:
        raise UsageError(
            f"{name}: masks of coordinates leave vectors, but {rule.name} needs a matrix; mask layers or tensors"
        )
    if p.numel() < masks.masks:
        raise UsageError(f"{name}: {p.numel()} entries cannot be split over {masks.masks} masks; leave it out of them")
    slots = blank({name: Group("", rule, (), 0.0)}, {name: p.detach().flatten()[: p.numel() // masks.masks]})[name]
    if policy != "drop" and slots.keys() - {"scale"}:
        raise UsageError(
            f"{name}: masks of coordinates hold the state of active entries only; got state_policy {policy!r}, "
            "expected 'drop', or a rule without state"
        )
