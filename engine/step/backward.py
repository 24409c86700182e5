"""Forward and backward over a chain, in the two orders that differ in memory. Each hands a segment's gradients to
`use` once all micro-batches have contributed, and returns the mean loss.

`scale` multiplies a loss that comes without a count. Where losses are sums with counts, gradients are those of sums
until all counts are known, and are divided by the total before they are used.

Of several processes each runs its own micro-batches. A segment's gradients are then summed over the processes while the
segment before goes backward, and used after that.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimizers.contract import Params, UsageError

from .gradients import Head, accumulate, leaf, reciprocal
from .processes import ALONE, Arriving, Processes
from .segments import Batch, Chain

Use = Callable[[Params], None]


class _Means:
    """Adds up the losses of micro-batches, and what they are divided by."""

    def __init__(self, chain: Chain, params: Params, scale: Tensor, use: Use, processes: Processes) -> None:
        self.chain, self.params, self.use, self.processes = chain, params, use, processes
        self.total = torch.zeros_like(scale)
        self.count: Tensor | None = None
        self.factor: Tensor | None = None  # of gradients of sums, once all counts are known
        self.arriving: Arriving | None = None  # gradients of the segment before, where there are several processes

    def add(self, head: Head) -> None:
        self.total += head.loss
        if head.targets is not None:
            self.count = head.targets if self.count is None else self.count + head.targets

    def hand_over(self, i: int, held: Params) -> None:
        """Take the gradients of segment i out of `held`: all micro-batches of this process are in them."""
        if self.count is not None and self.factor is None:
            self.factor = reciprocal(self.processes.total(self.count))
        grads = {name: held.pop(name) for name in self.chain.owned[i] if name in held}
        if self.processes.world == 1:
            self._use(grads)
            return
        self._check_complete(i, grads)
        before, self.arriving = self.arriving, self.processes.reduce(grads)
        if before is not None:
            self._use(before())

    def _use(self, grads: Params) -> None:
        if self.factor is not None:
            for g in grads.values():
                g.mul_(self.factor)
        self.use(grads)

    def _check_complete(self, i: int, grads: Params) -> None:
        """Raises UsageError where another process might have a gradient that this one has not."""
        for name in self.chain.owned[i]:
            if self.params[name].requires_grad and name not in grads and name not in self.chain.resting:
                raise UsageError(
                    f"parameter {name!r} has no gradient: the loss of process {self.processes.rank} does not depend on "
                    "it; with several processes every parameter that trains must have one: freeze it"
                )

    def loss(self) -> Tensor:
        """The mean, when everything was handed over and used."""
        if self.arriving is not None:
            self._use(self.arriving())
        total = self.processes.total(self.total)
        if self.count is None:
            return total
        return total * (reciprocal(self.processes.total(self.count)) if self.factor is None else self.factor)


def stored(
    chain: Chain,
    params: Params,
    batches: Sequence[Batch],
    scale: Tensor,
    use: Use,
    processes: Processes = ALONE,
) -> Tensor:
    """Each micro-batch forward, then backward, its activations kept in between.

    With one micro-batch, gradients live for one segment; with more, all of them live until the last one.
    """
    means, held, lowest = _Means(chain, params, scale, use, processes), Params(), chain.lowest(params)
    alone, places = _alone(batches, processes), _places(batches, processes)
    for j, batch in enumerate(batches):
        x, kept = None, []
        for i in range(chain.last):
            x = leaf(x)
            chain.draws.seed(places[j], i)
            with torch.set_grad_enabled(i >= lowest):
                out = chain.forward(i, params, x, batch)
            if i >= lowest:
                kept.append((x, out))
            x = out.detach()
            del out
        chain.draws.seed(places[j], chain.last)
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
                means.hand_over(i, held)
    return means.loss()


def recomputed(
    chain: Chain,
    params: Params,
    batches: Sequence[Batch],
    scale: Tensor,
    use: Use,
    processes: Processes = ALONE,
) -> Tensor:
    """All micro-batches forward, keeping segment inputs only; then all backward, segment by segment.

    Gradients live for one segment whatever the number of micro-batches; the price is a second forward, and one
    residual stream per segment and micro-batch. The second forward draws what the first one drew, and reads and writes
    a copy of the buffers as the first one found them.
    """
    inputs: list[list[Tensor | None]] = []
    found: list[list[Params]] = []  # buffers that are state, before each forward
    places = _places(batches, processes)
    with torch.no_grad():
        for j, batch in enumerate(batches):
            xs: list[Tensor | None] = [None]
            found.append([])
            for i in range(chain.last):
                found[j].append(chain.copied(i))
                chain.draws.seed(places[j], i)
                xs.append(chain.forward(i, params, xs[-1], batch))
            inputs.append(xs)
    means, held, alone = _Means(chain, params, scale, use, processes), Params(), _alone(batches, processes)
    flowing: list[Tensor | None] = [None] * len(batches)
    for i in range(chain.last, chain.lowest(params) - 1, -1):
        for j, batch in enumerate(batches):
            chain.draws.seed(places[j], i)
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
        means.hand_over(i, held)
    return means.loss()


def _alone(batches: Sequence[Batch], processes: Processes) -> bool:
    """Is there but one micro-batch in the step?"""
    return len(batches) == 1 and processes.world == 1


def _places(batches: Sequence[Batch], processes: Processes) -> list[int]:
    """Which of all micro-batches of the step these are: processes take turns."""
    return [j * processes.world + processes.rank for j in range(len(batches))]


def _pull(
    chain: Chain, i: int, params: Params, x: Tensor | None, out: Tensor, g: Tensor
) -> tuple[Tensor | None, Params]:
    """Backward through segment i; its own frame, so that no activation outlives it."""
    return chain.backward(i, params, out, x, g)
