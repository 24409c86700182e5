"""How a model says it may be cut: a chain of segments, each run forward and backward on its own."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

Batch = dict[str, Tensor]  # "input_ids" and "targets", both int64 (B, T); targets are already shifted, -100 = ignored


class Segment(NamedTuple):
    """One link of the chain.

    Segments of one `kind` have the same structure: any one's `module` is the template for all of them, called through
    `torch.func.functional_call` with this segment's own parameters, so they share one compiled graph. `names` maps
    each parameter's name inside `module` to its full name in the model's `named_parameters`; where a parameter is
    tied, two segments map to the same full name and their gradients add up.

    Buffers are the template's: they must be the same in all segments of a kind, and nothing may write to them.

    `call(module, x, batch)` is a module-level function: the first segment gets x = None, the last returns the *sum*
    of the loss over valid targets, 0-d float32. `tokens` says that this sum may be taken over slices: the last
    segment then accepts any x (..., C) with batch["targets"] (...).
    """

    kind: str
    module: nn.Module
    names: dict[str, str]
    call: Callable[[nn.Module, Tensor | None, Batch], Tensor]
    tokens: bool = False
