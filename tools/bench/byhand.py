"""Training loops that one writes without this engine and with the same switches: blocks compiled one by one, their
activations recomputed, the optimizer run inside backward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from models.llama import Llama


def by_hand(model: Llama, batch: dict[str, Tensor], in_backward: bool) -> Callable[[], object]:
    """A step with each block compiled and checkpointed, under fused AdamW.

    `in_backward`: each parameter has an optimizer of its own, which runs as soon as its gradient is complete, and the
    gradient goes at once. Neither accumulation nor clipping by the global norm can be had in that way.
    """
    for i, layer in enumerate(model.model.layers):
        layer.compile(fullgraph=True)
        model.model.layers[i] = Checkpointed(layer)
    fused = partial(torch.optim.AdamW, fused=True)
    if in_backward:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(partial(_update, fused([p])))
    whole = None if in_backward else fused(model.parameters())

    @torch.compile
    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model.logits(x).flatten(0, 1), targets.flatten())

    def run() -> None:
        loss(model.model(batch["input_ids"]), batch["targets"]).backward()
        if whole is not None:
            whole.step()
            whole.zero_grad(set_to_none=True)

    return run


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward; only its input is kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, *inputs, use_reentrant=False)
        return out


def _update(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    optimizer.step()
    p.grad = None
