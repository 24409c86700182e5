"""How a model says it may be cut: a chain of segments, each run forward and backward on its own."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

# Of a language model "input_ids" and "targets", int64 (B, T); targets are already shifted. Where rows hold several
# documents, "documents" numbers them and "positions" counts in each, int64 (B, T) both. Where most targets are IGNORED,
# "supervised" (B, k) holds the places in each row of those that are not, filled up with places of some that are.
Batch = dict[str, Tensor]
Loss = tuple[Tensor, Tensor | int | float]  # the sum of a loss, 0-d, and how many targets it is the sum over
IGNORED = -100  # a target with this value is not predicted, and does not count


class Segment(NamedTuple):
    """One link of the chain.

    Segments of one `kind` that are alike in all but their numbers share a template and one compiled graph: it is called
    through `torch.func.functional_call` with this segment's own parameters and buffers. `names` maps each parameter's
    name inside `module` to its full name in the model's `named_parameters`; where a parameter is tied, two segments map
    to the same full name and their gradients add up. `buffers` does the same for the buffers that are state (the
    persistent ones); None: they are called as the parameters are, behind the same prefix. Attributes that make no
    difference to the forward, such as a layer's number, are listed in `ignore`; all others are compared, and segments
    that differ in one are compiled apart. They are read when the chain is made: later changes are not seen.

    `call(module, x, batch)`: the first segment gets x = None, the last returns the loss, 0-d float32:

        tokens          the *sum* over valid targets, which may be taken over slices of tokens: x is then (..., C), and
                        every field of the batch whose shape begins as batch["targets"]' does is sliced along; with
                        loss weights, or whatever else is not a count of targets that are not IGNORED, a `Loss`.
                        `vocabulary` says how many logits a token has; 0: unknown, all tokens at once
        otherwise       a `Loss`; or the mean over the batch, where a step has one micro-batch
    """

    kind: str
    module: nn.Module
    names: Mapping[str, str]
    call: Callable[[nn.Module, Tensor | None, Batch], Tensor | Loss]
    tokens: bool = False
    vocabulary: int = 0
    buffers: Mapping[str, str] | None = None
    ignore: tuple[str, ...] = ()
