"""Which parameters train when: masks drawn without replacement, as pure functions of (key, step).

A cycle is M masks, each held for `period` steps. Every cycle splits the groups anew into M masks, so that each group is
in exactly one; times the scale M, the masks of a cycle sum to M everywhere (arXiv 2603.05960, equation 3). What is in
no group is in every mask, at scale 1.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..contract import Params, Slot, Slots, UsageError
from ..random import Key, fold, permutation

Kind = Literal["layers", "tensors", "coordinates"]
Order = Literal["epochwise", "joint"]
WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # what DDP and torch.compile add to names


class Groups(NamedTuple):
    """What masks choose among: a label and parameters each. With `sizes`, masks are balanced by them, else by count.

    Of "coordinates", each group is one tensor, and masks choose among its entries.
    """

    kind: Kind
    labels: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...] = ()


def layers(params: Params, pattern: str = r"\blayers\.(\d+)\.") -> Groups:
    """A group per layer. `pattern`, a regular expression searched in names, has the layer's index as its one group.

    `module.` and `_orig_mod.` are no part of a name here. Raises UsageError where nothing matches.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for name in params:
        bare = WRAPPERS.sub("", name)
        if match := re.search(pattern, bare):
            if len(match.groups()) != 1 or not str(match[1]).isdecimal():
                raise UsageError(
                    f"layer pattern {pattern!r}: got {match.groups()} from {bare!r}, expected one group of digits, the "
                    r"layer's index; write it like '\blayers\.(\d+)\.'"
                )
            found.setdefault((int(match[1]), bare[: match.end()].rstrip(".")), []).append(name)
    if not found:
        raise UsageError(
            f"layer pattern {pattern!r} matches no parameter: nothing would be masked; the names look like "
            f"{[WRAPPERS.sub('', name) for name in list(params)[:3]]}"
        )
    order = sorted(found)
    return Groups("layers", tuple(label for _, label in order), tuple(tuple(found[key]) for key in order))


def tensors(params: Params, match: Sequence[str] = ("",), balance: Literal["count", "numel"] = "count") -> Groups:
    """A group per tensor whose name matches. Masks hold equally many tensors, or about equally many elements."""
    names = _matching(params, match)
    sizes = tuple(params[name].numel() for name in names) if balance == "numel" else ()
    return Groups("tensors", tuple(names), tuple((name,) for name in names), sizes)


def coordinates(params: Params, match: Sequence[str] = ("",)) -> Groups:
    """Masks choose entries inside every tensor whose name matches."""
    names = _matching(params, match)
    return Groups("coordinates", tuple(names), tuple((name,) for name in names))


def _matching(params: Params, match: Sequence[str]) -> list[str]:
    for pattern in match:
        if not any(re.search(pattern, name) for name in params):
            raise UsageError(
                f"mask pattern {pattern!r} matches no parameter; the names look like {list(params)[:3]}: change it"
            )
    return [name for name in params if any(re.search(pattern, name) for pattern in match)]


class Position(NamedTuple):
    """Where a step is: the cycle, the mask of that cycle, and the step among those of the mask. Cycle -1 is warm-up."""

    cycle: int
    mask: int
    step: int


class Traversal(NamedTuple):
    """The schedule. `each` groups are in a mask (0: as many as make M equal parts, by number or by size).

    `literal` skips the groups that a cycle has left over, as Algorithm 2 does, instead of giving them a smaller mask.
    With `replacement` every period is a cycle of its own, of which only the first mask is used (LISA; per-step i.i.d.
    masks at period 1). `order` "joint" takes the pairs of (mask, batch) of a cycle in random order.
    """

    groups: Groups
    masks: int
    each: int
    period: int
    key: Key
    order: Order = "epochwise"
    reshuffle: bool = True
    replacement: bool = False
    literal: bool = False
    warmup: int = 0

    @property
    def length(self) -> int:
        """Steps in a cycle."""
        return self.period * (1 if self.replacement else self.masks)

    @property
    def scale(self) -> float:
        """One over the share of steps in which a group trains: M / n_c, as a group is in n_c = 1 masks of a cycle."""
        n = len(self.groups.labels)
        if self.groups.kind != "coordinates" and not self.groups.sizes and (self.literal or self.replacement):
            return n / len(self.members(0, 0))
        return float(self.masks)

    def at(self, step: int) -> Position:
        """The place of a step."""
        if step < self.warmup:
            return Position(-1, 0, step)
        cycle, inside = divmod(step - self.warmup, self.length)
        if self.order == "joint":
            inside = _pairs(self.key, cycle, self.length)[inside]
        return Position(cycle, *divmod(inside, self.period))

    def batch(self, step: int) -> int:
        """The batch of a step: in a joint order, that which the pair's step has in epochwise order."""
        cycle, mask, inside = self.at(step)
        return step if cycle < 0 else self.warmup + cycle * self.length + mask * self.period + inside

    def members(self, cycle: int, mask: int) -> tuple[int, ...]:
        """The groups in a mask, ascending; all of them in warm-up, and where masks choose coordinates."""
        n = len(self.groups.labels)
        if cycle < 0 or self.groups.kind == "coordinates":
            return tuple(range(n))
        order, sizes = list(range(n)), self.groups.sizes
        if self.groups.kind == "tensors":  # drawn by name: whatever order the parameters come in
            order = sorted(order, key=self.groups.labels.__getitem__)
            sizes = tuple(sizes[i] for i in order) if sizes else ()
        drawn = split(fold(self.key, "mask", self._drawn(cycle)), n, self.masks, self.each, sizes)[mask]
        return tuple(sorted(order[i] for i in drawn))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What a traversal has seen: it is a pure function of the step, and keeps nothing. `own` is empty below."""
        return ()

    def fresh(self, step: int, device: torch.device) -> Slots:
        """No slots."""
        return {}

    def choose(self, own: Slots, step: int) -> Slots:
        """No slots."""
        return own

    def observe(self, own: Slots, squares: Mapping[int, Tensor]) -> Slots:
        """No slots."""
        return own

    def active(self, step: int, own: Slots | None = None) -> tuple[int, ...]:
        """The groups that train at a step."""
        return self.members(*self.at(step)[:2])

    def before(self, step: int, own: Slots | None = None) -> tuple[int, ...]:
        """The groups that trained at the step before."""
        return self.active(step - 1)

    def since(self, group: int, step: int, own: Slots | None = None) -> int:
        """The step after the last one, up to `step`, at which a group trained; 0 if it never did."""
        while step >= 0:
            if group in self.active(step):
                return step + 1
            step -= 1 if self.order == "joint" else self.at(step).step + 1
        return 0

    def entries(self, name: str, numel: int, step: int) -> Tensor:
        """Where masks choose coordinates: the entries of a tensor that train at a step, ascending, int32 (k,)."""
        cycle, mask, _ = self.at(step)
        if cycle < 0 or self.masks == 1:
            return torch.arange(numel, dtype=torch.int32)
        drawn = permutation(fold(self.key, "entries", name, self._drawn(cycle)), numel)
        part = drawn[mask * numel // self.masks : (mask + 1) * numel // self.masks]
        return part.int().sort().values

    def switches(self, step: int) -> bool:
        """Is the mask of this step another than that of the step before?"""
        if step == 0 or self.at(step)[:2] == self.at(step - 1)[:2]:
            return False
        if self.groups.kind == "coordinates":
            return self.masks > 1
        return step == self.warmup or self.active(step) != self.active(step - 1)

    def write(self) -> str:
        """As JSON, for the head of a checkpoint."""
        return json.dumps(self._replace(groups=self.groups._asdict())._asdict())  # type: ignore[arg-type]

    def _drawn(self, cycle: int) -> int:
        """The cycle whose draw this one uses."""
        return cycle if self.reshuffle or self.replacement else 0


@lru_cache(maxsize=256)
def split(key: Key, n: int, masks: int, count: int = 0, sizes: tuple[int, ...] = ()) -> tuple[tuple[int, ...], ...]:
    """range(n) split at random into `masks` parts, each ascending: `count` in each and what is left in the last, or
    (count 0) equally many to within one; or, given `sizes`, with sums about equal (largest first, to the lightest)."""
    drawn: list[int] = permutation(key, n).tolist()
    if sizes:
        parts: list[list[int]] = [[] for _ in range(masks)]
        weight = [0] * masks
        for i in sorted(drawn, key=lambda i: -sizes[i].bit_length()):  # sizes within a factor of two: in random order
            lightest = min(range(masks), key=lambda j: weight[j])
            parts[lightest].append(i)
            weight[lightest] += sizes[i]
    elif count:
        parts = [drawn[j : j + count] for j in range(0, masks * count, count)]
    else:
        parts = [drawn[j * n // masks : (j + 1) * n // masks] for j in range(masks)]
    return tuple(tuple(sorted(part)) for part in parts)


@lru_cache(maxsize=4)
def _pairs(key: Key, cycle: int, length: int) -> list[int]:
    """Algorithm 1's R_k: the (mask, batch) pairs of a cycle, numbered in epochwise order, in random order."""
    drawn: list[int] = permutation(fold(key, "pairs", cycle), length).tolist()
    return drawn


def traversal(
    groups: Groups,
    key: Key,
    *,
    active: int | None = None,
    keep: float | None = None,
    period: int,
    order: Order = "epochwise",
    remainder: Literal["short", "reset"] = "short",
    reshuffle: bool = True,
    replacement: bool = False,
    mask_warmup: int = 0,
) -> Traversal:
    """The schedule, with M = ceil(groups / active), or ceil(1 / keep), masks in a cycle.

    The paper's masks of a ratio r hold r, r, ..., and the rest; these are of equal size, which peaks lower. Raises
    UsageError for numbers that do not go together.
    """
    n = len(groups.labels)
    if (active is None) == (keep is None):
        raise UsageError(f"masks: got active={active} and keep={keep}; give one of the two")
    if active is not None and groups.kind == "coordinates":
        raise UsageError("masks of coordinates: got active; expected keep, the share of entries that train at a time")
    if active is not None and not 1 <= active <= n:
        raise UsageError(f"active: got {active} of {n} {groups.kind}; give a number from 1 to {n}")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"keep: got {keep}, expected a share above 0 and at most 1")
    if period < 1 or mask_warmup < 0:
        raise UsageError(f"period and mask_warmup: got {period} and {mask_warmup} steps; give at least 1 and 0")
    if replacement and (order == "joint" or remainder == "reset"):
        raise UsageError(
            "replacement: masks drawn anew each period have no cycle to order or to fill; got "
            f"order {order!r} and remainder {remainder!r}, expected 'epochwise' and 'short'"
        )
    if remainder == "reset" and active is None:
        raise UsageError("remainder='reset' is Algorithm 2's, which counts groups; give active")
    masks = ceil(n / active) if active is not None else ceil(1 / (keep or 1) - 1e-9)
    if groups.kind != "coordinates" and masks > n:
        raise UsageError(
            f"keep: got {keep} of {n} {groups.kind}, which asks for {masks} masks; keep at least {1 / n:.3g}"
        )
    literal = remainder == "reset" and active is not None and n % active > 0
    made = Traversal(
        groups,
        masks - literal,
        0 if groups.sizes else active or 0,
        period,
        key,
        order,
        reshuffle,
        replacement,
        literal,
        mask_warmup,
    )
    if not (literal or replacement or groups.kind == "coordinates"):  # equation 3; of entries, by construction
        visits = Counter(i for j in range(made.masks) for i in made.members(0, j))
        assert all(visits[i] * made.scale == made.masks for i in range(n)), visits
    return made


def duration(text: str, epoch: int) -> int:
    """Steps of "2epoch" (each `epoch` steps) or "100step". Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+)\s*(epoch|step)s?", text.strip())
    if not match:
        raise UsageError(f"duration: got {text!r}; expected a whole number and a unit, such as 1epoch or 100step")
    return int(match[1]) * (epoch if match[2] == "epoch" else 1)


def gives_up(made: Traversal, epoch: int) -> str:
    """What a schedule loses with data of `epoch` steps a pass; empty where each pair of a mask and a sample is visited
    equally often in every cycle."""
    if made.replacement or made.scale == 1 or not (made.period % epoch or made.warmup % epoch):
        return ""
    odd = f"a mask is held for {made.period} steps" if made.period % epoch else f"masks begin at step {made.warmup}"
    return (
        f"{odd}, and a pass over the data is {epoch}: within a cycle, samples are not paired with every mask equally "
        "often, and masking errors of single samples do not cancel; the masks themselves still do. Give whole epochs"
    )


def read(text: str) -> Traversal:
    """The schedule that `Traversal.write` wrote."""
    content: dict[str, Any] = json.loads(text)
    kind, labels, names, sizes = (content["groups"][field] for field in Groups._fields)
    groups = Groups(kind, tuple(labels), tuple(map(tuple, names)), tuple(sizes))
    return Traversal(**{**content, "groups": groups})


def describe(metadata: Mapping[str, str], params: Params, step: int) -> dict[str, Any]:
    """Where a step is in its traversal, as JSON, from the `metadata` of an optimizer or the head of a checkpoint.

    "cycle", "mask" and "masks" (counted from 0; cycle -1 is the warm-up), "step" within the mask, "active" (labels),
    "order" (labels of every mask of the cycle), "trainable" (share of all elements) and "visits" (steps in which each
    group has trained, before this one).
    """
    made = read(metadata["traversal"])
    cycle, mask, inside = made.at(step)
    labels, single = made.groups.labels, cycle < 0 or made.replacement
    coordinates = made.groups.kind == "coordinates"
    chosen = made.active(step)
    masked = {name for names in made.groups.names for name in names}
    trainable = sum(p.numel() for name, p in params.items() if name not in masked)
    for i in chosen:
        for name in made.groups.names[i]:
            size = params[name].numel()
            trainable += len(made.entries(name, size, step)) if coordinates else size
    visits: Counter[int] = Counter()
    for place, times in Counter(made.at(t)[:2] for t in range(step)).items():
        for i in made.members(*place):
            visits[i] += times
    return {
        "cycle": cycle,
        "mask": mask,
        "masks": made.masks,
        "step": inside,
        "active": [labels[i] for i in chosen],
        "order": [[labels[i] for i in made.members(cycle, j)] for j in range(1 if single else made.masks)],
        "trainable": trainable / sum(p.numel() for p in params.values()),
        "visits": {label: visits[i] for i, label in enumerate(labels)},
    }
