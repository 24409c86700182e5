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
"joint"; it needs "keep" and saves no memory. The paper's experiments, and the default here, are epochwise. With
`turn_warmup` (ours) the learning rate of a tensor rises over its first steps after each activation: see `warmup`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..contract import Group, Kind, Optimizer, Params, Rule, Slot, Slots, State, UsageError
from ..partition import blank
from ..random import Key
from ..state import parked_by, place, with_status
from .choice import STATE, TURN_WARMUP, Choice
from .masked import ENTRIES, gathered, scaled
from .norms import NormMasks
from .traversal import Traversal
from .warmup import AGE, unused, warming
from .wrapper import Wrapper

Policy = Literal["drop", "keep", "offload"]
ScaleMode = Literal["grad", "none", "update"]


@dataclass(frozen=True, eq=False)
class Omgd(Wrapper):
    """`base`, of which only what the current mask keeps trains; see `omgd`, which makes it.

    `scale` is the name of the slot that holds the mask's scale, `age` of that which counts the steps of a turn; empty
    where none is used. `depth` numbers the masks in a stack, the innermost being 1: by it slots say who has parked
    them.
    """

    masks: Choice
    grouped: Mapping[str, int]  # parameters that are masked -> their group
    scale: str
    age: str
    policy: Policy
    depth: int

    @property
    def compact(self) -> bool:
        """Do masks choose entries inside of tensors?"""
        return self.masks.groups.kind == "coordinates"

    @property
    def key(self) -> str:
        """The key of the masks' own slots in the state."""
        return f"masks:{self.depth}"

    @property
    def shared(self) -> Mapping[str, tuple[Slot, ...]]:
        return {**self.base.shared, **({self.key: self.masks.slots} if self.masks.slots else {})}

    @property
    def singly(self) -> frozenset[str]:
        own = frozenset(self.grouped) if self.masks.groups.kind == "tensors" else frozenset[str]()
        return self.base.singly | own

    def init(self, params: Params, step: int = 0, shared: State | None = None) -> State:
        shared = dict(shared or {})
        if self.masks.slots and self.key not in shared:
            shared[self.key] = self.masks.fresh(step, next(iter(params.values()), torch.empty(0)).device)
        state = self.base.init({n: p for n, p in params.items() if n not in self.grouped}, step, shared)
        shared |= {key: state.pop(key) for key in self.base.shared}
        last, own = max(step - 1, 0), shared.get(self.key, {})  # a mask is switched before its first step, not before
        now = set(self.masks.active(last, own))
        for name, p in params.items():
            if name not in self.grouped:
                continue
            if self.grouped[name] in now:
                state |= self._fresh(name, p, last, shared)
            elif self.policy != "drop":  # as it was when it left, or at the start
                left = self._fresh(name, p, max(self.masks.since(self.grouped[name], last, own) - 1, 0), shared)
                state |= {n: self._parked(self._marked(slots, p, last), n, p) for n, slots in left.items()}
        return {n: state[n] for n in params if n in state} | {key: shared[key] for key in self.shared}

    def choose(self, shared: State, step: int) -> State:
        shared = self.base.choose(shared, step)
        if not self.masks.slots or not self.masks.switches(step):
            return shared
        return {**shared, self.key: self.masks.choose(shared[self.key], step)}

    def observe(self, shared: State, squares: Sequence[tuple[Sequence[str], Tensor]]) -> State:
        shared = self.base.observe(shared, squares)
        if not self.masks.slots:
            return shared
        sums: dict[int, Tensor] = {}
        for names, values in squares:
            groups = [self.grouped.get(name) for name in names]
            for group in dict.fromkeys(g for g in groups if g is not None):
                own = [values[i] for i, other in enumerate(groups) if other == group]
                part = values.sum() if len(own) == len(names) else torch.stack(own).sum()
                sums[group] = sums[group] + part if group in sums else part
        return {**shared, self.key: self.masks.observe(shared[self.key], sums)}

    def switch(self, params: Params, state: State, step: int, key: Key) -> tuple[Params, State]:
        params, new = dict(params), dict(state)
        shared = {key: new.pop(key) for key in self.shared}
        own = shared.get(self.key, {})
        now, before = set(self.masks.active(step, own)), set(self.masks.before(step, own))
        mine = {name: self.grouped[name] for name in params if name in self.grouped}
        for name in [n for n, group in mine.items() if group in before and group not in now and n in new]:
            left = new.pop(name)
            params |= self.base.merge({name: params[name]}, {name: left})
            if self.policy != "drop":
                new[name] = self._parked(left, name, params[name])
        if self.base.switches(step):
            staying = {n: p for n, p in params.items() if n not in mine or (mine[n] in now and mine[n] in before)}
            old = {n: new.pop(n) for n in staying if n in new}
            moved, switched = self.base.switch(staying, old | shared, step, key)
            params |= moved
            new |= {n: slots for n, slots in switched.items() if n in staying}
        for name in [n for n, group in mine.items() if group in now]:
            if self.compact and self.masks.switches(step):
                new |= self._fresh(name, params[name], step, shared)
            elif mine[name] not in before:
                held = new.pop(name, None)
                if held is None:
                    new |= self._fresh(name, params[name], step, shared)
                else:
                    moved, back = self._returned(name, params[name], held, shared, step, key)
                    params |= moved
                    new |= back
            if name in new:
                new[name] = self._marked(new[name], params[name], step)
        return params, {name: new[name] for name in params if name in new} | shared

    def _returned(self, name: str, p: Tensor, held: Slots, shared: State, step: int, key: Key) -> tuple[Params, State]:
        """A parameter that trains again, and the state that it left with."""
        by = {depth: host for depth, host in parked_by(held).items() if depth != self.depth}
        params: Params = {name: p}
        state: State = {name: place(with_status(by, held), p.device)}
        since = self.masks.since(self.grouped[name], step - 1, shared.get(self.key, {}))
        for missed in filter(self.base.switches, range(since, step + 1)):  # what changed while it was away
            params, after = self.base.switch(params, state | shared, missed, key)
            state = {n: slots for n, slots in after.items() if n == name}
        if self.age and name in state:
            state[name][self.age] = torch.zeros_like(state[name][self.age])
        return params, state

    def due(self, step: int, state: State | None = None) -> tuple[str, ...]:
        names = dict.fromkeys(self.base.due(step, state))
        if not self.masks.switches(step) or self.compact:
            return tuple(names)
        own = (state or {}).get(self.key, {})
        now, before = set(self.masks.active(step, own)), set(self.masks.before(step, own))
        new = {n for n, group in self.grouped.items() if group in now and group not in before}
        new = {n for n in new if self.owner[n].rule.refresh}
        if self.policy == "drop":
            return tuple(names | dict.fromkeys(sorted(new)))
        since = {n: self.masks.since(self.grouped[n], step - 1, own) for n in new}
        for t in range(step - 1, -1, -1):  # ends within a gap: until then each has been active, or due
            new = {n for n in new if since[n] <= t}
            if not new:
                break
            late = new.intersection(self.base.due(t))
            names |= dict.fromkeys(sorted(late))
            new -= late
        return tuple(names)

    def switches(self, step: int) -> bool:
        return self.masks.switches(step) or self.base.switches(step)

    def batch(self, step: int) -> int:
        return self.base.batch(self.masks.batch(step))

    def _fresh(self, name: str, p: Tensor, step: int, shared: State) -> State:
        """State of a parameter that trains at `step`, as new; none where a mask inside of this one freezes it."""
        if not self.compact:
            made = self.base.init({name: p}, step + 1, shared)
            return {n: self._marked(slots, p, step) for n, slots in made.items() if n == name}
        assert isinstance(self.masks, Traversal)
        entries = self.masks.entries(name, p.numel(), step).to(p.device)
        slots = self.base.init({name: p.detach().flatten()[: len(entries)]}, 0, shared)[name]
        return {name: self._marked({**slots, ENTRIES: entries}, p, step)}

    def _marked(self, slots: Slots, p: Tensor, step: int) -> Slots:
        """Slots with the scale of the mask at `step`, and with a turn's steps counted from 0 where they were not."""
        own: Slots = {}
        if self.age:
            own[self.age] = slots[self.age] if self.age in slots else p.new_zeros((), dtype=torch.float32)
        if self.scale:
            scale = 1.0 if step < self.masks.warmup else self.masks.scale
            own[self.scale] = p.new_full((), scale, dtype=torch.float32)
        return place(with_status(parked_by(slots), {**slots, **own}), p.device) if own else slots

    def _parked(self, slots: Slots, name: str, p: Tensor) -> Slots:
        """Slots of what leaves; what it added to the weight was merged, so nothing is left of that."""
        still = self.owner[name].rule.names(Kind.WEIGHT)
        kept = {slot: torch.zeros_like(t) if slot in still else t for slot, t in slots.items()}
        return place(with_status({**parked_by(slots), self.depth: self.policy == "offload"}, kept), p.device)


def omgd(
    base: Optimizer,
    params: Params,
    masks: Choice,
    scale_mode: ScaleMode = "grad",
    state_policy: Policy = "drop",
    turn_warmup: int = 0,
) -> Omgd:
    """`base`, with only what the current mask keeps being trained. State: as `base`'s for what is active.

    `turn_warmup`: over how many of its steps the learning rate of a masked tensor rises when it trains again, and at
    the start; whatever becomes of its state. What trains under two masks in a row goes on as it was.

    A masked tensor has a slot `scale` more (0-d float32; not with scale_mode "none"), and with `turn_warmup` a slot
    `age`, the steps of its turn (0-d float32). Where masks choose coordinates it
    has `entries` too (int32 (k,), positions in the flattened tensor), and its other slots are those of a vector (k,).
    "keep" and "offload" (to the host) hold a frozen tensor's slots as `Parked` ones, all of them from the start.
    A basis that is fresh, or fell due while its tensor was frozen, is rebuilt at the tensor's first step.

    Of tensors, compiled code computes the gradients of a whole segment where one of them trains, and throws away those
    of the others: see `Optimizer.singly`.
    Raises UsageError for what cannot be combined, and names the tensor that a rule cannot serve.
    """
    if isinstance(masks, NormMasks) and scale_mode != "none":
        raise UsageError(
            "omgd: masks by norm do not visit all groups equally often, so there is nothing to scale by; got "
            f"scale_mode {scale_mode!r}, expected 'none'"
        )
    if base.shared and state_policy != "drop":
        raise UsageError(
            "omgd: what masks by norm did to a tensor while other masks froze it is not recorded, so these cannot "
            f"keep its state; got state_policy {state_policy!r} over them, expected 'drop'"
        )
    if masks.order == "joint" and state_policy != "keep":
        raise UsageError(
            f"omgd: order 'joint' changes the mask every step; got state_policy {state_policy!r}, expected 'keep'"
        )
    if turn_warmup < 0 or (turn_warmup and masks.order == "joint"):
        raise UsageError(
            f"omgd: turn_warmup: got {turn_warmup} under order {masks.order!r}, expected at least 0, and 0 where order "
            "'joint' makes every step a turn of its own"
        )
    compact = masks.groups.kind == "coordinates"
    grouped = {name: i for i, names in enumerate(masks.groups.names) for name in names if name in base.owner}
    owner: dict[str, Group] = dict(base.owner)
    rules: dict[Rule, Rule] = {}  # one a rule, so that all layers share a kernel
    held = {slot.name for name in grouped for slot in base.owner[name].rule.slots}
    scale, age = unused("scale", held), unused(AGE, held) if turn_warmup else ""
    for name in grouped:
        group = base.owner[name]
        if scale_mode == "update" and group.rule.names(Kind.BITS):
            raise UsageError(
                f"{name}: got scale_mode 'update' with last bits of weights (precision bf16+8), which are those of "
                "whole updates; give 'grad' or 'none'"
            )
        if compact and any(slot.given for slot in group.rule.slots):
            raise UsageError(
                f"{name}: masks of coordinates are for plain rules, got {group.rule.name} under another wrapper; mask "
                "layers or tensors"
            )
        if group.rule not in rules:
            rule = warming(group.rule, turn_warmup, age) if age else group.rule
            rules[group.rule] = rule if scale_mode == "none" else scaled(rule, scale_mode, scale)
        owner[name] = group._replace(rule=rules[group.rule])
    if compact:
        assert isinstance(masks, Traversal)
        gathers = {rule: gathered(rule, masks.masks) for rule in rules.values()}
        for name in grouped:
            rule = owner[name].rule
            _check_coordinates(name, params[name], rule, masks, state_policy)
            owner[name] = owner[name]._replace(rule=gathers[rule])
    depth = 1 + masked_depth(base)
    said: dict[str, str] = {"traversal": masks.write(), "scale_mode": scale_mode, "state_policy": state_policy}
    said |= {TURN_WARMUP: str(turn_warmup)} if turn_warmup else {}
    slot, metadata = "" if scale_mode == "none" else scale, _over(base.metadata, said)
    made = Omgd(base, owner, metadata, masks, grouped, slot, age, state_policy, depth)
    return replace(made, metadata={**metadata, STATE: made.key}) if masks.slots else made


def masked_depth(optimizer: Optimizer) -> int:
    """How many masks lie over each other in an optimizer."""
    if isinstance(optimizer, Omgd):
        return optimizer.depth
    return masked_depth(optimizer.base) if isinstance(optimizer, Wrapper) else 0


def _over(inner: Mapping[str, str], own: dict[str, str]) -> dict[str, str]:
    """What masks say of themselves, and what those below them do, each of which is one "over." deeper."""
    names = {*own, STATE, TURN_WARMUP}
    return {f"over.{k}" if k.rpartition("over.")[2] in names else k: v for k, v in inner.items()} | own


def _check_coordinates(name: str, p: Tensor, rule: Rule, masks: Traversal, policy: Policy) -> None:
    if rule.refresh:
        raise UsageError(
            f"{name}: masks of coordinates leave vectors, but {rule.name} needs a matrix; mask layers or tensors"
        )
    if p.numel() < masks.masks:
        raise UsageError(f"{name}: {p.numel()} entries cannot be split over {masks.masks} masks; leave it out of them")
    slots = blank({name: Group("", rule, (), 0.0)}, {name: p.detach().flatten()[: p.numel() // masks.masks]})[name]
    if policy != "drop" and slots.keys() - {"scale", AGE}:
        raise UsageError(
            f"{name}: masks of coordinates hold the state of active entries only; got state_policy {policy!r}, "
            "expected 'drop', or a rule without state"
        )
