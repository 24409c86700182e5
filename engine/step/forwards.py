"""A segment's forward as a function of its parameters and buffers, given by their names in its module."""

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.segment import Batch, Loss, Segment
from optimizers.contract import Params, UsageError

Compiler = Callable[["Forward"], "Forward"]


class Forward(Protocol):
    """A segment's forward with parameters and buffers given by their names in its module.

    It returns its output, and what became of the buffers in `state`, which it does not write to.
    """

    def __call__(
        self, params: Params, x: Tensor | None, batch: Batch, buffers: Params, state: Params
    ) -> tuple[Tensor | Loss, Params]: ...


class Caller(nn.Module):
    """Makes `call(module, x, batch)` a forward, so that functional_call can hand the module its parameters.

    The module is a copy whose own parameters hold no memory: were it one of the segments, Dynamo would tell the call
    with that segment's parameters from those with others', and compile it twice. Buffers stay shared.
    """

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor | None, Batch], Tensor | Loss]) -> None:
        super().__init__()
        shared = {id(b): b for b in module.buffers()}
        bare = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
        self.module, self._call = copy.deepcopy(module, {**shared, **bare}), call

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor | Loss:
        return self._call(self.module, x, batch)


def make_forward(caller: Caller, compute_dtype: torch.dtype | None) -> Forward:
    kept = _beside_statistics(caller.module)

    def forward(
        params: Params, x: Tensor | None, batch: Batch, buffers: Params, state: Params
    ) -> tuple[Tensor | Loss, Params]:
        if compute_dtype is not None:
            params = {name: p if name in kept else p.to(compute_dtype) for name, p in params.items()}
        given = {**params, **buffers, **{name: b.clone() for name, b in state.items()}}
        given = {f"module.{name}": t for name, t in given.items()}
        out: Tensor | Loss = functional_call(caller, given, (x, batch))
        # functional_call leaves in `given` what the module has put in a buffer's place
        return out, {name: given[f"module.{name}"].detach() for name in state}

    return forward


def _beside_statistics(module: nn.Module) -> frozenset[str]:
    """Parameters of batch norms: kernels take them in the dtype of the running statistics, whatever the input's."""
    return frozenset(
        f"{prefix}{'.' * bool(prefix)}{name}"
        for prefix, norm in module.named_modules()
        if getattr(norm, "running_mean", None) is not None
        for name, _ in norm.named_parameters(recurse=False)
    )


def state_names(segment: Segment) -> dict[str, str]:
    """The full names of the buffers that are state, by their names in the module. Raises UsageError without one."""
    saved = segment.module.state_dict(keep_vars=True)
    state = [name for name, _ in segment.module.named_buffers() if name in saved]
    if segment.buffers is not None:
        names = dict(segment.buffers)
    else:
        heads = {full.removesuffix(own) if full.endswith(own) else None for own, full in segment.names.items()}
        prefix = heads.pop() if len(heads) == 1 else None
        names = {} if prefix is None else {name: prefix + name for name in state}
    if missing := [name for name in state if name not in names]:
        raise UsageError(
            f"{segment.kind}: buffer {missing[0]!r} is state, and has no full name; give it one in Segment.buffers, or "
            "register it with persistent=False"
        )
    return {name: names[name] for name in state}
