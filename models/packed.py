"""Attention in rows that hold several documents: no token sees another document's, and positions restart in each.

Letters in shapes as in `layers`. Everything has one static shape, whatever the documents are.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .segment import Batch


class Documents(NamedTuple):
    """Of every token, the number of its document and its position in it: int64 (B, T) each."""

    number: Tensor
    position: Tensor


def documents_of(batch: Batch) -> Documents | None:
    """A batch's "documents" and "positions"; None where its rows are one text each."""
    return Documents(batch["documents"], batch["positions"]) if "documents" in batch else None


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, grouped: bool) -> Tensor:
    """Causal attention inside documents: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    Compiled on CUDA it is FlexAttention, which skips blocks of the mask that are empty; elsewhere SDPA with a mask.
    """
    if q.is_cuda and torch.compiler.is_compiling():
        return flexible(q, k, v, documents, window, grouped)
    k, v, grouped = for_kernel(q, k, v, grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen(documents, window), enable_gqa=grouped)


def for_kernel(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> tuple[Tensor, Tensor, bool]:
    """Keys and values as SDPA takes them, and whether it has to group heads itself.

    In float32 CUDA has one kernel that does not hold (T, T) scores, and it does not know of groups: there every query
    head is given its own copy of keys and values.
    """
    if not grouped or not q.is_cuda or q.dtype != torch.float32:
        return k, v, grouped
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), False


def seen(documents: Documents, window: int | None) -> Tensor:
    """Which tokens each token sees: (B, 1, T, T) bool."""
    number = documents.number
    tokens = number.shape[1]
    mask = number.new_ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    return ((number[:, :, None] == number[:, None, :]) & mask)[:, None]


def flexible(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, grouped: bool) -> Tensor:
    """The same by FlexAttention."""
    number = documents.number

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (number[b, i] == number[b, j]) & (j <= i)
        return same if window is None else same & (i - j < window)

    rows, tokens = number.shape
    mask: BlockMask = create_block_mask(sees, rows, None, tokens, tokens, device=str(number.device))
    y = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    assert isinstance(y, Tensor)
    return y
