"""A model as a chain of segments, run forward and backward one segment at a time.

Segments of one kind share a template module and so one compiled graph: the template is called with each segment's own
parameters (`torch.func.functional_call`). The residual stream is cut between segments, so backward through one of
them needs nothing of the others, and its gradients can be used and freed before the next one's exist.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optimizers.contract import Params, UsageError

from .compile import compiled

Batch = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor | None, Batch], Tensor]


class Forward(Protocol):
    """A segment's forward with parameters given by their names in its module, and with these buffers or its own."""

    def __call__(self, params: Params, x: Tensor | None, batch: Batch, buffers: Params | None = None) -> Tensor: ...


class Segment(Protocol):
    """What a model's `segments()` gives; `models.segment.Segment` says what the fields mean."""

    @property
    def kind(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def names(self) -> Mapping[str, str]: ...
    @property
    def call(self) -> Call: ...
    @property
    def tokens(self) -> bool: ...


class Whole(NamedTuple):
    """Any module as a chain of one; `call(module, None, batch)` returns the mean loss of the batch, 0-d."""

    module: nn.Module
    names: Mapping[str, str]
    call: Call
    kind: str = "model"
    tokens: bool = False


def cut(model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor] | None = None) -> Sequence[Segment]:
    """The segments of `model`: its own `segments()`, or, given `loss(module, batch) -> 0-d mean loss`, a chain of one.

    Raises UsageError where a module without `segments()` comes without a loss.
    """
    if loss is not None:
        objective = loss
        names = {name: name for name, _ in model.named_parameters()}
        return [Whole(model, names, lambda module, _, batch: objective(module, batch))]
    if not hasattr(model, "segments"):
        raise UsageError(f"{type(model).__name__} has no segments(); pass loss=... to train it as a chain of one")
    own: Callable[[], Sequence[Segment]] = model.segments  # type: ignore[assignment]
    return own()


class Chain:
    """The segments with their compiled forwards, and gradients one segment at a time."""

    def __init__(
        self, segments: Sequence[Segment], compile: bool, compute_dtype: torch.dtype | None = None, logits: int = 2**24
    ) -> None:
        """`compute_dtype` casts parameters inside a forward. `logits` bounds the logits alive at once."""
        self.segments, self.logits, self.last = segments, logits, len(segments) - 1
        self.forwards: dict[str, Forward] = {}
        self.buffers: dict[str, Params] = {}  # those that are state, which a forward may write to
        for segment in segments:
            if segment.kind not in self.forwards:
                forward = _make_forward(segment, compute_dtype)
                self.forwards[segment.kind] = compiled(forward) if compile else forward
                state = segment.module.state_dict(keep_vars=True)
                self.buffers[segment.kind] = {n: b for n, b in segment.module.named_buffers() if n in state}
        self.names = list(dict.fromkeys(full for s in segments for full in s.names.values()))
        # A tied parameter belongs to the first segment that names it; later ones hand their gradient down to it.
        owner = {full: i for i in reversed(range(len(segments))) for full in segments[i].names.values()}
        self.owned = [
            tuple(n for n in dict.fromkeys(s.names.values()) if owner[n] == i) for i, s in enumerate(segments)
        ]

    def lowest(self, params: Params) -> int:
        """The first segment with something to train, or the last: nothing below it needs a backward."""
        trains = (any(params[full].requires_grad for full in segment.names.values()) for segment in self.segments)
        return next((i for i, trained in enumerate(trains) if trained), self.last)

    def forward(self, i: int, params: Params, x: Tensor | None, batch: Batch) -> Tensor:
        """Output of segment i; `params` holds the whole model's."""
        segment = self.segments[i]
        return self.forwards[segment.kind]({own: params[full] for own, full in segment.names.items()}, x, batch)

    def backward(
        self, i: int, params: Params, out: Tensor, x: Tensor | None, g: Tensor
    ) -> tuple[Tensor | None, Params]:
        """Gradients of segment i with respect to its input x (a leaf, or None) and to its trainable parameters."""
        trainable = {n: params[n] for n in dict.fromkeys(self.segments[i].names.values()) if params[n].requires_grad}
        leaves = [*([x] if x is not None and x.requires_grad else []), *trainable.values()]
        if not leaves:
            return None, {}
        grads = list(torch.autograd.grad(out, leaves, g))
        gx = grads.pop(0) if len(grads) > len(trainable) else None
        return gx, dict(zip(trainable, grads, strict=True))

    def head(
        self, params: Params, x: Tensor | None, batch: Batch, scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Params]:
        """Loss and gradients of the last segment, a slice of tokens at a time, so that not all logits exist at once."""
        if x is None or not self.segments[-1].tokens:
            x = leaf(x)
            loss = self.forward(self.last, params, x, batch)
            return loss.detach() * scale, *self.backward(self.last, params, loss, x, scale.to(loss.dtype))
        flat, targets = x.detach().flatten(0, -2), batch["targets"].flatten()
        total, gx, grads = torch.zeros_like(scale), torch.empty_like(flat), Params()
        for part in self.slices(params, len(flat)):
            piece = flat[part].requires_grad_()
            loss = self.forward(self.last, params, piece, {"targets": targets[part]})
            g, own = self.backward(self.last, params, loss, piece, scale)
            assert g is not None
            gx[part] = g
            accumulate(grads, own)
            total += loss.detach() * scale
        return total, gx.view_as(x), grads

    @torch.no_grad()
    def loss(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """For evaluation: (summed loss, valid targets), or (mean loss, 1) where the chain's loss is a mean; 0-d."""
        x: Tensor | None = None
        for i in range(self.last):
            x = self.forward(i, params, x, batch)
        if x is None or not self.segments[-1].tokens:
            loss = self.forward(self.last, params, x, batch)
            return loss, torch.ones_like(loss)
        flat, targets = x.flatten(0, -2), batch["targets"].flatten()
        parts = self.slices(params, len(flat))
        losses = [self.forward(self.last, params, flat[part], {"targets": targets[part]}) for part in parts]
        return torch.stack(losses).sum(), (targets >= 0).sum()

    def slices(self, params: Params, tokens: int) -> list[slice]:
        """range(tokens) cut so that a slice has at most `logits` logits: equal slices where a nearby count allows it,
        because a ragged last one costs a graph of its own."""
        vocabulary = max(params[n].shape[0] for n in self.segments[-1].names.values())
        least = -(-tokens // max(1, self.logits // vocabulary))
        count = next((n for n in range(least, min(2 * least, tokens) + 1) if tokens % n == 0), least)
        size = -(-tokens // count)
        return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def leaf(x: Tensor | None) -> Tensor | None:
    """x cut from its graph, ready to receive a gradient."""
    return None if x is None else x.detach().requires_grad_(x.is_floating_point())


def accumulate(held: Params, more: Params) -> None:
    """Add gradients to those already held, in place."""
    for name, g in more.items():
        held[name] = held[name].add_(g) if name in held else g


class _Caller(nn.Module):
    """Makes `call(module, x, batch)` a forward, so that functional_call can hand the module its parameters.

    The module is a copy whose own parameters hold no memory: were it one of the segments, Dynamo would tell the call
    with that segment's parameters from those with others', and compile it twice. Buffers stay shared.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        shared = {id(b): b for b in module.buffers()}
        bare = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
        self.module, self._call = copy.deepcopy(module, {**shared, **bare}), call

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        return self._call(self.module, x, batch)


def _make_forward(template: Segment, compute_dtype: torch.dtype | None) -> Forward:
    caller = _Caller(template.module, template.call)

    def forward(params: Params, x: Tensor | None, batch: Batch, buffers: Params | None = None) -> Tensor:
        if compute_dtype is not None:
            params = {name: p.to(compute_dtype) for name, p in params.items()}
        given = {**params, **(buffers or {})}
        out: Tensor = functional_call(caller, {f"module.{name}": t for name, t in given.items()}, (x, batch))
        return out

    return forward
