"""A rule of matrices on the weights of convolutions.

A convolution's weight (out, in, k, k) is the matrix (out, in k k) that maps a patch to its outputs, as Muon's authors
and K-FAC take it. Rules here read leading dimensions as a stack of matrices, which of a convolution would be one of
k x k for each pair of channels; so they get it flattened, and keep their slots in that shape.
"""

from dataclasses import replace

from torch import Tensor

from .contract import Hyper, Rule, Slots
from .moments import Moments
from .random import Key


def flattened(rule: Rule) -> Rule:
    """`rule` on tensors (out, ...) as matrices (out, rest). One that moves each entry by itself stays as it is."""
    if rule.elementwise:
        return rule
    refreshes, exports, adopts = rule.refresh, rule.export, rule.adopt

    def init(p: Tensor) -> Slots:
        return rule.init(_flat(p))

    def update(g: Tensor, slots: Slots, p: Tensor, hyper: Hyper) -> tuple[Tensor | None, Slots]:
        delta, new = rule.update(_flat(g), slots, _flat(p), hyper)
        return None if delta is None else delta.reshape(p.shape), new

    def refresh(g: Tensor, slots: Slots, key: Key, only_missing: bool = False) -> tuple[Slots, Tensor]:
        assert refreshes is not None
        return refreshes(_flat(g), slots, key, only_missing)

    def export(slots: Slots, p: Tensor) -> Moments:
        assert exports is not None
        first, second, seen = exports(slots, _flat(p))
        first, second = (None if t is None else t.reshape(p.shape) for t in (first, second))
        return Moments(first, second, seen)

    def adopt(moments: Moments, slots: Slots, p: Tensor, key: Key) -> tuple[Slots, str]:
        assert adopts is not None
        first, second = (None if t is None else _flat(t) for t in moments[:2])
        return adopts(Moments(first, second, moments.seen), slots, _flat(p), key)

    return replace(
        rule,
        init=init,
        update=update,
        refresh=refresh if refreshes else None,
        export=export if exports else None,
        adopt=adopt if adopts else None,
    )


def _flat(t: Tensor) -> Tensor:
    return t.flatten(1) if t.ndim > 2 else t
