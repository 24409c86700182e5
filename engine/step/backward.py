"""Forward and backward over a chain, in the two orders that differ in memory. Each hands a segment's gradients to
`use` once all micro-batches have contributed, and returns the mean loss.

`scale` multiplies a loss that comes without a count. Where losses are sums with counts, gradients are those of sums
until all counts are known, and are divided by the total before they are used.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizers.contract import Params

from .gradients import Head, accumulate, leaf, reciprocal
from .segments import Batch, Chain

Use = Callable[[Params], None]


class _Means:
    """Adds up the losses of micro-batches, and what they are divided by."""

    def __init__(self, scale: Tensor, use: Use) -> None:
        self.total, self.use = torch.zeros_like(scale), use
        self.count: Tensor | None = None

    def add(self, head: Head) -> None:
        self.total += head.loss
        if head.targets is not None:
            self.count = head.targets if self.count is None else self.count + head.targets

    def hand_over(self, grads: Params) -> None:
        """Gradients of which all micro-batches are there."""
        if self.count is not None:
            factor = reciprocal(self.count)
            for g in grads.values():
                g.mul_(factor)
        self.use(grads)

    def loss(self) -> Tensor:
        return self.total if self.count is None else self.total * reciprocal(self.count)


def stored(chain: Chain, params: Params, batches: Sequence[Batch], scale: Tensor, use: Use) -> Tensor:
    """Each micro-batch forward, then backward, its activations kept in between.

    With one micro-batch, gradients live for one segment; with more, all of them live until the last one.
    """
    means, held, lowest, alone = _Means(scale, use), Params(), chain.lowest(params), len(batches) == 1
    for j, batch in enumerate(batches):
        x, kept = None, []
        for i in range(chain.last):
            x = leaf(x)
            chain.draws.seed(j, i)
            with torch.set_grad_enabled(i >= lowest):
                out = chain.forward(i, params, x, batch)
            if i >= lowest:
                kept.append((x, out))
            x = out.detach()
            del out
        chain.draws.seed(j, chain.last)
        head = chain.head(params, x, batch, scale, alone)
        means.add(head)
        g, grads, safe = head.g, head.grads, alone and head.targets is None
        del x, head
        for i in range(chain.last, lowest - 1, -1):
            if i < chain.last:
                assert g is not None
                g, grads = _pull(chain, i, params, *kept.pop(), g)
            accumulate(held, grads, safe, g, scale)
            grads = {}
            if j == len(batches) - 1:
                means.hand_over({name: held.pop(name) for name in chain.owned[i] if name in held})
    return means.loss()


def recomputed(chain: Chain, params: Params, batches: Sequence[Batch], scale: Tensor, use: Use) -> Tensor:
    """All micro-batches forward, keeping segment inputs only; then all backward, segment by segment.

    Gradients live for one segment whatever the number of micro-batches; the price is a second forward, and one
    residual stream per segment and micro-batch. The second forward draws what the first one drew, and reads and writes
    a copy of the buffers as the first one found them.
    """
    inputs: list[list[Tensor | None]] = []
    found: list[list[Params]] = []  # buffers that are state, before each forward
    with torch.no_grad():
        for j, batch in enumerate(batches):
            xs: list[Tensor | None] = [None]
            found.append([])
            for i in range(chain.last):
                found[j].append(chain.copied(i))
                chain.draws.seed(j, i)
                xs.append(chain.forward(i, params, xs[-1], batch))
            inputs.append(xs)
    means, held, alone = _Means(scale, use), Params(), len(batches) == 1
    flowing: list[Tensor | None] = [None] * len(batches)
    for i in range(chain.last, chain.lowest(params) - 1, -1):
        for j, batch in enumerate(batches):
            chain.draws.seed(j, i)
            if i == chain.last:
                head = chain.head(params, inputs[j].pop(), batch, scale, alone)
                means.add(head)
                flowing[j], grads = head.g, head.grads
                del head
            else:
                x, g = leaf(inputs[j].pop()), flowing[j]
                assert g is not None
                out = chain.forward(i, params, x, batch, found[j].pop())
                flowing[j], grads = _pull(chain, i, params, x, out, g)
                del x, g, out
            accumulate(held, grads, alone and means.count is None, flowing[j], scale)
            grads = {}
        means.hand_over({name: held.pop(name) for name in chain.owned[i] if name in held})
    return means.loss()


def _pull(
    chain: Chain, i: int, params: Params, x: Tensor | None, out: Tensor, g: Tensor
) -> tuple[Tensor | None, Params]:
    """Backward through segment i; its own frame, so that no activation outlives it."""
    return chain.backward(i, params, out, x, g)
