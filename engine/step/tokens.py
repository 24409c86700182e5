"""The tokens that the last segment is given: which of them, and how many at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.segment import IGNORED, Batch

SUPERVISED = "supervised"  # the field of a batch that says which tokens have targets


def valid(batches: Sequence[Batch]) -> Tensor:
    """The targets of these batches that are not IGNORED, 0-d."""
    return torch.stack([(batch["targets"] != IGNORED).sum() for batch in batches]).sum()


def selected(x: Tensor, batch: Batch) -> tuple[Tensor, Batch, Tensor | None]:
    """Tokens (N, C) of x (..., C) for the head, the fields that say something of each, and which they are.

    They are all tokens (None); or, where the batch says which are supervised (B, k), of x (B, T, C) those.
    """
    fields = _by_token(batch)
    if SUPERVISED not in batch:
        return x.flatten(0, -2), fields, None
    offsets = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    places = (batch[SUPERVISED] + offsets).flatten()
    return x.flatten(0, -2)[places], {name: t[places] for name, t in fields.items() if name != SUPERVISED}, places


def _by_token(batch: Batch) -> Batch:
    """The fields that say something of each token, flattened: those whose shape begins as that of the targets."""
    shape = batch["targets"].shape
    return {name: t.flatten(0, len(shape) - 1) for name, t in batch.items() if t.shape[: len(shape)] == shape}


def put_back(g: Tensor, x: Tensor, places: Tensor | None) -> Tensor:
    """Gradients (N, C) of what `selected` took from x, as a gradient of x."""
    return g.view_as(x) if places is None else torch.zeros_like(x).flatten(0, -2).index_copy_(0, places, g).view_as(x)


def parts(tokens: int, x: Tensor, places: Tensor | None, most: int) -> list[slice]:
    """range(tokens) cut for the head. Where they are selected from those of x, slices have one size whatever their
    number: `tokens` is then a multiple of an eighth of x's, or all that is cut is cut alike."""
    unit = x.shape[:-1].numel() // 8
    if places is None or not unit or tokens % unit:
        return slices(tokens, most)
    inner = slices(unit, most)
    return [slice(at + i.start, at + i.stop) for at in range(0, tokens, unit) for i in inner]


def slices(tokens: int, most: int) -> list[slice]:
    """range(tokens) cut into slices of at most `most` tokens: equal slices where a nearby count allows it, because a
    ragged last one costs a graph of its own."""
    least = -(-tokens // most)
    count = next((n for n in range(least, min(2 * least, tokens) + 1) if tokens % n == 0), least)
    size = -(-tokens // count)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
