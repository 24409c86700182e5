"""The hot update of one segment: every tensor's rule, results written in place, one graph for all like segments.

A pure update followed by `copy_` into the old buffers inside one compiled function allocates nothing, so rules stay
pure and memory stays flat. The kernel works on lists, not on names, so that all blocks of a model share it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .apply import Bound, move
from .contract import Hyper, Rule, Slots

Kernel = Callable[[Sequence[Tensor], Sequence[Slots], Sequence[Tensor], Sequence[Hyper], Tensor, Tensor | None], Tensor]


def make_kernel(rules: Sequence[Rule], clip: Bound = "none") -> Kernel:
    """A function (grads, slots, params, hypers, bound, seed) -> squared gradient norms, (len(rules),) float32.

    It moves `params` and `slots` in place, each by `move`, to which `clip` and the 0-d `bound` go. The norms are those
    before clipping. `seed` (len(rules),) int32, one a parameter, rounds bfloat16 parameters stochastically; None rounds
    to nearest.
    """

    def kernel(
        grads: Sequence[Tensor],
        slots: Sequence[Slots],
        params: Sequence[Tensor],
        hypers: Sequence[Hyper],
        bound: Tensor,
        seed: Tensor | None,
    ) -> Tensor:
        squares = []
        for i, (rule, g, old, p, hyper) in enumerate(zip(rules, grads, slots, params, hypers, strict=True)):
            own = None if seed is None else seed[i]
            moved, new, square = move(rule, g, old, p, hyper, clip=clip, bound=bound, seed=own)
            squares.append(square)
            if moved is not p:
                p.copy_(moved)
            for slot, value in new.items():
                if value is not old[slot]:
                    old[slot].copy_(value)
        return torch.stack(squares)

    return kernel
