"""What is common to the gradients of all segments: where they are cut, added up, and divided by a count."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimizers.contract import Params


class Head(NamedTuple):
    """What the last segment gives for one micro-batch.

    `loss` (0-d float32) and gradients are those of the mean; or, where `targets` (0-d float32) says of how many, of the
    sum.
    `g` is the gradient of its input, `grads` are those of its parameters.
    """

    loss: Tensor
    targets: Tensor | None
    g: Tensor | None
    grads: Params


def leaf(x: Tensor | None) -> Tensor | None:
    """x cut from its graph, ready to receive a gradient."""
    return None if x is None else x.detach().requires_grad_(x.is_floating_point())


def accumulate(held: Params, more: Params, safe: bool = True, *shared: Tensor | None) -> None:
    """Add gradients to those already held, in place; what more than one contributes to is held in float32 at least.

    Unless it is `safe` to hold them as they are, because nothing will be written to them, a gradient that shares its
    memory with another one, with itself or with one of `shared` is copied first: of y = a + b both are one tensor.
    """
    taken = {t.untyped_storage()._cdata for t in shared if t is not None}
    for name, g in more.items():
        if name in held:
            if held[name].dtype in (torch.bfloat16, torch.float16):  # the first one is exact, a sum would not be
                held[name] = held[name].float()
            held[name].add_(g)
            continue
        storage = g.untyped_storage()._cdata
        if not safe and (storage in taken or 0 in g.stride()):
            g = g.contiguous() if 0 in g.stride() and storage not in taken else g.clone()
        taken.add(storage)
        held[name] = g


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, 0-d float32, or 0 where nothing was counted: nothing is learned from no targets."""
    return torch.where(count > 0, 1 / count, 0.0).float()
