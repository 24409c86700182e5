"""Mode "step": forward, backward and update of a whole chain in one compiled graph.

Backward comes from `torch.func.vjp`, a segment at a time, because autograd's own calls cannot be traced. All gradients
exist at once and compile time grows with depth; it suits chains of one and small models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from optimizers.core import Hyper, Params, Slots

from .compile import compiled
from .kernel import Kernel
from .segments import Batch, Chain


class Move(NamedTuple):
    """Arguments of the update kernel beside gradients and parameters."""

    slots: list[Slots]
    hypers: list[Hyper]
    bound: Tensor
    seed: Tensor | None


def make_graph(
    chain: Chain, names: Sequence[str], moved: Sequence[str], kernel: Kernel, recompute: bool, clip_norm: Tensor | None
) -> Callable[..., tuple[Tensor, Params, Tensor | None]]:
    """A compiled (params, batch, scale, held, move) -> (loss, gradients, squared norms) for trainable `names`, whose
    gradients move the parameters `moved`.

    `held` are gradients to add to (None for the first micro-batch). Given `move`, the parameters move in place, no
    gradients are returned and the norms are; else the reverse. A `clip_norm` clips the global norm before the update.
    """

    def pull(i: int, params: Params, x: Tensor | None, batch: Batch) -> Any:
        own = {name: params[full] for name, full in chain.segments[i].names.items()}
        kind = chain.segments[i].kind
        buffers = chain.buffers[kind]

        def pure(own: Params, x: Tensor | None = None) -> tuple[Tensor, Params]:
            """vjp refuses a write to a tensor that it does not know, such as BatchNorm's to its running mean."""
            written = {name: b.clone() for name, b in buffers.items()}
            return chain.forwards[kind](own, x, batch, written), written

        pulled: Any = vjp(pure, *((own,) if x is None else (own, x)), has_aux=True)
        out, back, written = pulled
        for name, b in buffers.items():
            b.copy_(written[name])
        return out, back

    def whole(
        params: Params, batch: Batch, scale: Tensor, held: Params | None, move: Move | None
    ) -> tuple[Tensor, Params, Tensor | None]:
        grads = dict(held) if held is not None else {}

        def collect(i: int, own: Params) -> None:
            for name, full in chain.segments[i].names.items():
                if full in names:
                    grads[full] = grads[full] + own[name] if full in grads else own[name]

        x: Tensor | None = None
        kept: list[tuple[Tensor | None, Callable[..., Any] | None]] = []
        for i in range(chain.last):
            if recompute:
                kept.append((x, None))
                x = chain.forward(i, params, x, batch)
            else:
                out, back = pull(i, params, x, batch)
                kept.append((x, back))
                x = out
        if x is None or not chain.segments[-1].tokens:
            loss, back = pull(chain.last, params, x, batch)
            own, *g = back(scale.to(loss.dtype))
            collect(chain.last, own)
            total = loss * scale
        else:
            flat, targets, total, pieces = x.flatten(0, -2), batch["targets"].flatten(), torch.zeros_like(scale), []
            for part in chain.slices(params, len(flat)):
                loss, back = pull(chain.last, params, flat[part], {"targets": targets[part]})
                own, piece = back(scale)
                collect(chain.last, own)
                pieces.append(piece)
                total = total + loss * scale
            g = [torch.cat(pieces).view_as(x)]
        for i in range(chain.last - 1, -1, -1):
            x, back = kept[i]
            if back is None:
                back = pull(i, params, x, batch)[1]
            own, *g = back(*g)
            collect(i, own)
        if move is None:
            return total, grads, None
        ordered, bound = [grads[name] for name in names], move.bound
        if clip_norm is not None:
            norm = torch.stack([g.float().square().sum() for g in ordered]).sum().sqrt()
            bound = (clip_norm / (norm + 1e-6)).clamp(max=1)
        squares = kernel(ordered, move.slots, [params[n] for n in moved], move.hypers, bound, move.seed)
        return total, {}, squares

    return compiled(whole)
