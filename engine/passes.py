"""Forward and backward over a chain, in the two orders that differ in memory. Each hands a segment's gradients to
`use` once all micro-batches have contributed, and returns the mean loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizers.contract import Params

from .segments import Batch, Chain, accumulate, leaf

Use = Callable[[Params], None]


def stored(chain: Chain, params: Params, batches: Sequence[Batch], scales: Sequence[Tensor], use: Use) -> Tensor:
    """Each micro-batch forward, then backward, its activations kept in between.

    With one micro-batch, gradients live for one segment; with more, all of them live until the last one.
    """
    total, held, lowest = torch.zeros_like(scales[0]), Params(), chain.lowest(params)
    for j, (batch, scale) in enumerate(zip(batches, scales, strict=True)):
        x, kept = None, []
        for i in range(chain.last):
            x = leaf(x)
            with torch.set_grad_enabled(i >= lowest):
                out = chain.forward(i, params, x, batch)
            if i >= lowest:
                kept.append((x, out))
            x = out.detach()
            del out
        loss, g, grads = chain.head(params, x, batch, scale)
        total += loss
        del x
        for i in range(chain.last, lowest - 1, -1):
            if i < chain.last:
                assert g is not None
                g, grads = _pull(chain, i, params, *kept.pop(), g)
            accumulate(held, grads)
            grads = {}
            if j == len(batches) - 1:
                use({name: held.pop(name) for name in chain.owned[i] if name in held})
    return total


def recomputed(chain: Chain, params: Params, batches: Sequence[Batch], scales: Sequence[Tensor], use: Use) -> Tensor:
    """All micro-batches forward, keeping segment inputs only; then all backward, segment by segment.

    Gradients live for one segment whatever the number of micro-batches; the price is a second forward, and one
    residual stream per segment and micro-batch.
    """
    inputs: list[list[Tensor | None]] = []
    with torch.no_grad():
        for batch in batches:
            xs: list[Tensor | None] = [None]
            for i in range(chain.last):
                xs.append(chain.forward(i, params, xs[-1], batch))
            inputs.append(xs)
    total, held = torch.zeros_like(scales[0]), Params()
    flowing: list[Tensor | None] = [None] * len(batches)
    for i in range(chain.last, chain.lowest(params) - 1, -1):
        for j, (batch, scale) in enumerate(zip(batches, scales, strict=True)):
            if i == chain.last:
                loss, flowing[j], grads = chain.head(params, inputs[j].pop(), batch, scale)
                total += loss
            else:
                x, g = leaf(inputs[j].pop()), flowing[j]
                assert g is not None
                flowing[j], grads = _pull(chain, i, params, x, chain.forward(i, params, x, batch), g)
                del x, g
            accumulate(held, grads)
            grads = {}
        use({name: held.pop(name) for name in chain.owned[i] if name in held})
    return total


def _pull(
    chain: Chain, i: int, params: Params, x: Tensor | None, out: Tensor, g: Tensor
) -> tuple[Tensor | None, Params]:
    """Backward through segment i; its own frame, so that no activation outlives it."""
    return chain.backward(i, params, out, x, g)
