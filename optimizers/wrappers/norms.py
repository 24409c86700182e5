"""Masks chosen by the gradient norms that training has seen: layers that move more train more often.

    every `period` steps, of n groups `active` are chosen:
        first those that never trained, in random order
        then, without replacement, each with probability proportional to  s_i = sqrt(v_i)
    v_i <- memory v_i + (1 - memory) mean ||g_i||²    over the steps in which i trained since the last choice

||g_i||² are the squared norms of a group's gradients before clipping, which every step has anyway: of a parameter's
gradient, or of what stands for it, such as dB under RSO. The first mean is taken as it is.

What is known: LISA (Pan et al., arXiv 2403.17919) draws layers uniformly, and motivates the draw by how weight norms
differ between layers. OWS (Li et al., arXiv 2405.18380) draws the layers that it fine-tunes by their share of outliers.
Importance sampling by gradient norms is older than both. This draw, its memory and its order are ours; whether models
train better by it than by a traversal was not measured. There is no cycle whose masks sum to a constant: nothing is
scaled, and OMGD's equation 3 does not hold.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import Kind, Params, Slot, Slots, UsageError
from ..random import Key, fold, word
from .traversal import Groups, Order

SLOTS = (
    Slot("norms", Kind.COUNTER),  # (2, n) float32: since the last choice, sums of squared norms, and of how many steps
    Slot("scores", Kind.COUNTER, host=True),  # (n,) float64: v
    Slot("visits", Kind.COUNTER, host=True),  # (n,) int64: steps that each has trained, up to the last choice
    Slot("since", Kind.COUNTER, host=True),  # (n,) int64: the step after the last one at which each trained
    Slot("chosen", Kind.INDEX, host=True),  # (n,) bool: what trains now
    Slot("before", Kind.INDEX, host=True),  # (n,) bool: what trained before the last choice
)


@dataclass(frozen=True)
class NormMasks:
    """The choice. What it has seen is in slots (`SLOTS`): all but `norms` are on the host, and nothing but `choose`,
    once a period, reads what a device holds."""

    groups: Groups
    each: int
    period: int
    key: Key
    memory: float = 0.5
    warmup: int = 0

    slots = SLOTS
    order: Order = "epochwise"
    scale = 1.0

    def fresh(self, step: int, device: torch.device) -> Slots:
        """The slots after `step` steps of which nothing was seen."""
        n, last = len(self.groups.labels), max(step - 1, 0)
        chosen = [True] * n
        if last >= self.warmup:
            drawn = last - (last - self.warmup) % self.period
            chosen = draw(self._key(drawn), [0.0] * n, [0] * n, self.each)
        host = _host([0.0] * n, [0] * n, [step] * n, chosen, chosen)
        return {"norms": torch.zeros(2, n, device=device), **host}

    def switches(self, step: int) -> bool:
        """Is a mask chosen before this step?"""
        return step > 0 and step >= self.warmup and (step - self.warmup) % self.period == 0

    def choose(self, own: Slots, step: int) -> Slots:
        """The slots with the mask of the period that begins with `step`. Waits for the device, once."""
        squares, times = own["norms"].tolist()
        scores, visits, since, chosen = (own[slot].tolist() for slot in ("scores", "visits", "since", "chosen"))
        for i, seen in enumerate(times):
            if seen > 0:
                mean = squares[i] / seen
                scores[i] = mean if not visits[i] else self.memory * scores[i] + (1 - self.memory) * mean
                visits[i] += int(seen)
            since[i] = step if chosen[i] else since[i]
        now = draw(self._key(step), scores, visits, self.each)
        return {"norms": torch.zeros_like(own["norms"]), **_host(scores, visits, since, now, chosen)}

    def observe(self, own: Slots, squares: Mapping[int, Tensor]) -> Slots:
        """The slots after a step in which these groups' gradients had these squared norms, 0-d; stays on the device."""
        zero, one = (own["norms"].new_full((), value) for value in (0.0, 1.0))
        every = range(len(self.groups.labels))
        sums, times = [squares.get(i, zero) for i in every], [one if i in squares else zero for i in every]
        return {**own, "norms": own["norms"] + torch.stack([*sums, *times]).view(2, -1)}

    def active(self, step: int, own: Slots) -> tuple[int, ...]:
        """The groups that train at a step, ascending; `own` are the slots as that step has them."""
        return _indices(own["chosen"])

    def before(self, step: int, own: Slots) -> tuple[int, ...]:
        """The groups that trained at the step before."""
        return _indices(own["before"] if self.switches(step) else own["chosen"])

    def since(self, group: int, step: int, own: Slots) -> int:
        """The step after the last one at which a group trained that does not now; 0 if it never did."""
        return int(own["since"][group])

    def batch(self, step: int) -> int:
        """Batches come in order."""
        return step

    def write(self) -> str:
        """As JSON, for the head of a checkpoint."""
        return json.dumps({"choose": "norms", **asdict(self), "groups": self.groups._asdict()})

    def _key(self, step: int) -> Key:
        return fold(self.key, "norms", step)


def norm_masks(
    groups: Groups, key: Key, *, active: int, period: int, memory: float = 0.5, mask_warmup: int = 0
) -> NormMasks:
    """Masks of `active` groups each, drawn anew every `period` steps. Raises UsageError for what cannot be."""
    n = len(groups.labels)
    if groups.kind == "coordinates":
        raise UsageError("masks by norm: got entries to choose among, expected layers or tensors")
    if not 1 <= active <= n:
        raise UsageError(f"active: got {active} of {n} {groups.kind}; give a number from 1 to {n}")
    if period < 1 or mask_warmup < 0:
        raise UsageError(f"period and mask_warmup: got {period} and {mask_warmup} steps; give at least 1 and 0")
    if not 0 <= memory < 1:
        raise UsageError(f"memory: got {memory}, expected a share of at least 0 and below 1")
    return NormMasks(groups, active, period, key, memory, mask_warmup)


def draw(key: Key, scores: Sequence[float], visits: Sequence[int], count: int) -> list[bool]:
    """Which `count` are chosen: those never visited first, then with probability proportional to the root of the score,
    without replacement.

    Each has an exponential clock whose rate is that root, and the first to ring are chosen (Efraimidis & Spirakis,
    2006). What has a score of zero, or none that is finite, rings last.
    """
    uniform = [(word(key, i) + 2**31 + 0.5) / 2**32 for i in range(len(scores))]
    clocks = [-math.log(u) for u in uniform]
    roots = [math.sqrt(v) if 0 < v < math.inf else 0.0 for v in scores]
    rings = [
        (0, clock, i) if not seen else (1, clock / root, i) if root else (2, clock, i)
        for i, (clock, root, seen) in enumerate(zip(clocks, roots, visits, strict=True))
    ]
    chosen = {i for _, _, i in sorted(rings)[:count]}
    return [i in chosen for i in range(len(scores))]


def describe(content: Mapping[str, Any], params: Params, step: int, own: Slots) -> dict[str, Any]:
    """What trains at the step that comes next, and why, as JSON: from what `NormMasks.write` wrote, and the slots of a
    checkpoint after `step` steps.

    "step" within the period, "active" (labels), "trainable" (share of all elements), "scores" (root-mean-square
    gradient norms, null where never seen) and "visits" (steps that each has trained).
    """
    fields = {name: content[name] for name in ("each", "period", "key", "memory", "warmup")}
    kind, labels, names, sizes = (content["groups"][field] for field in Groups._fields)
    made = NormMasks(Groups(kind, tuple(labels), tuple(map(tuple, names)), tuple(sizes)), **fields)
    inside = (step - made.warmup) % made.period if step >= made.warmup else step
    if own["norms"].is_meta:  # of a state without memory, which has seen nothing
        own = {**own, "norms": torch.zeros(own["norms"].shape)}
    own = made.choose(own, step) if made.switches(step) else own
    chosen, times = made.active(step, own), own["norms"][1].tolist()
    masked = {name for names in made.groups.names for name in names}
    still = masked - {name for i in chosen for name in made.groups.names[i]}
    total = sum(p.numel() for p in params.values())
    visits = [int(a + b) for a, b in zip(own["visits"].tolist(), times, strict=True)]
    scores = [math.sqrt(v) if seen else None for v, seen in zip(own["scores"].tolist(), own["visits"], strict=True)]
    return {
        "choose": "norms",
        "step": inside,
        "active": [labels[i] for i in chosen],
        "trainable": sum(p.numel() for n, p in params.items() if n not in still) / total,
        "scores": dict(zip(labels, scores, strict=True)),
        "visits": dict(zip(labels, visits, strict=True)),
    }


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(i for i, one in enumerate(mask.tolist()) if one)


def _host(
    scores: Sequence[float], visits: Sequence[int], since: Sequence[int], chosen: Sequence[bool], before: Sequence[bool]
) -> Slots:
    return {
        "scores": torch.tensor(scores, dtype=torch.float64, device="cpu"),
        "visits": torch.tensor(visits, dtype=torch.int64, device="cpu"),
        "since": torch.tensor(since, dtype=torch.int64, device="cpu"),
        "chosen": torch.tensor(chosen, dtype=torch.bool, device="cpu"),
        "before": torch.tensor(before, dtype=torch.bool, device="cpu"),
    }
