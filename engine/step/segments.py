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

from models.segment import IGNORED, Loss
from models.segment import Batch as Batch
from models.segment import Segment as Segment
from optimizers.contract import Params, UsageError
from optimizers.random import Key

from . import templates
from .observer import Observer
from .randomness import Draws

SUPERVISED = "supervised"  # the field of a batch that says which tokens have targets

Objective = Callable[[nn.Module, Batch], Tensor | Loss]
Judge = Callable[[nn.Module, Tensor | None, Batch], Tensor]  # of the last segment's module and input: a sum, 0-d
Compiler = Callable[["Forward"], "Forward"]


class Forward(Protocol):
    """A segment's forward with parameters and buffers given by their names in its module.

    It returns its output, and what became of the buffers in `state`, which it does not write to.
    """

    def __call__(
        self, params: Params, x: Tensor | None, batch: Batch, buffers: Params, state: Params
    ) -> tuple[Tensor | Loss, Params]: ...


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


def cut(model: nn.Module, loss: Objective | None = None) -> Sequence[Segment]:
    """The segments of `model`: its own `segments()`, or, given a loss, a chain of one.

    `loss(module, batch)` returns the sum of the loss and the number of its targets, or, where no step has more than one
    micro-batch, the mean, 0-d. Raises UsageError where a module without `segments()` comes without a loss.
    """
    if loss is not None:
        objective = loss
        names = {name: name for name, _ in model.named_parameters()}
        buffers = {name: name for name, _ in model.named_buffers()}
        return [Segment("model", model, names, lambda module, _, batch: objective(module, batch), buffers=buffers)]
    if not hasattr(model, "segments"):
        raise UsageError(f"{type(model).__name__} has no segments(); pass loss=... to train it as a chain of one")
    own: Callable[[], Sequence[Segment]] = model.segments  # type: ignore[assignment]
    return own()


class Chain:
    """The segments with their forwards, compiled or not, and gradients one segment at a time.

    Modules train in training mode and are evaluated in evaluation mode, whatever mode the user's module is in. But what
    was in evaluation mode when the chain was made, while another part of the model was not, stays in it.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        compiler: Compiler | None = None,
        compute_dtype: torch.dtype | None = None,
        logits: int = 2**24,
        draws: Draws | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`compute_dtype` casts parameters inside a forward. `logits` bounds the logits alive at once.

        Raises UsageError where a buffer that is state has no full name.
        """
        self.segments, self.logits, self.last = segments, logits, len(segments) - 1
        self.draws, self.observer = draws or Draws(torch.device("cpu")), observer or Observer()
        self.kinds, self.apart = templates.kinds(segments)
        self.labels = [
            f"{s.kind} {[t.kind for t in segments[:i]].count(s.kind)}" if _several(segments, s.kind) else s.kind
            for i, s in enumerate(segments)
        ]
        self.forwards: dict[str, Forward] = {}
        self._judging: dict[Judge, Forward] = {}
        self._compute_dtype = compute_dtype
        whole = any(m.training for s in segments for m in s.module.modules())
        self._modes: list[tuple[nn.Module, bool]] = []  # every module of the templates, and whether it trains
        self.training: bool | None = None
        for kind, segment in zip(self.kinds, segments, strict=True):
            if kind not in self.forwards:
                caller = _Caller(segment.module, segment.call)
                self._modes += [(m, m.training or not whole) for m in caller.module.modules()]
                forward = _make_forward(caller, compute_dtype)
                self.forwards[kind] = compiler(forward) if compiler else forward
        self.train()
        self.resting: frozenset[str] = frozenset()  # whose gradients are computed beside others', and let go at once
        buffers = [dict(segment.module.named_buffers()) for segment in segments]
        full = [_state_names(segment) for segment in segments]
        self.constant = [{n: b for n, b in own.items() if n not in full[i]} for i, own in enumerate(buffers)]
        self.stateful = [{n: b for n, b in own.items() if n in full[i]} for i, own in enumerate(buffers)]
        self.state = {full[i][n]: b for i, own in enumerate(self.stateful) for n, b in own.items()}
        self.names = list(dict.fromkeys(full for s in segments for full in s.names.values()))
        # A tied parameter belongs to the first segment that names it; later ones hand their gradient down to it.
        owner = {full: i for i in reversed(range(len(segments))) for full in segments[i].names.values()}
        self.owned = [
            tuple(n for n in dict.fromkeys(s.names.values()) if owner[n] == i) for i, s in enumerate(segments)
        ]

    def train(self, mode: bool = True) -> None:
        """Put every template into training mode or evaluation mode."""
        if self.training is not mode:
            self.training = mode
            for module, trains in self._modes:
                module.training = mode and trains

    def lowest(self, params: Params) -> int:
        """The first segment with something to train, or the last: nothing below it needs a backward."""
        trains = (any(params[full].requires_grad for full in segment.names.values()) for segment in self.segments)
        return next((i for i, trained in enumerate(trains) if trained), self.last)

    def forward(self, i: int, params: Params, x: Tensor | None, batch: Batch, again: Params | None = None) -> Tensor:
        """Output of segment i, not the last; `params` holds the whole model's.

        `again` says that it is a second forward, for backward, and what `copied(i)` was before the first one.
        """
        out = self._run(i, params, x, batch, again)
        assert isinstance(out, Tensor), f"{self.labels[i]}: a segment that is not the last returns a tensor"
        self.observer.made("residual stream", [out])
        return out

    def copied(self, i: int) -> Params:
        """A copy of the buffers of segment i that are state."""
        return {name: b.clone() for name, b in self.stateful[i].items()}

    def _run(
        self, i: int, params: Params, x: Tensor | None, batch: Batch, again: Params | None = None
    ) -> Tensor | Loss:
        """The forward reads a copy of what is state: its backward may read it too, when the buffers have moved on."""
        own, part = {own: params[full] for own, full in self.segments[i].names.items()}, "backward"
        batch = {name: t for name, t in batch.items() if name != SUPERVISED}  # its shape changes, no segment's does
        state = again
        if state is None:
            state, part = self.copied(i), "forward"
        with self.observer.doing(f"{part} of {self.labels[i]}", "forward"):
            out, written = self.forwards[self.kinds[i]](own, x, batch, self.constant[i], state)
        if again is None:
            with torch.no_grad():
                for name, b in self.stateful[i].items():
                    b.copy_(written[name])
        return out

    def _loss(self, params: Params, x: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The last segment's loss, and its count if it says one (0-d float32)."""
        out = self._run(self.last, params, x, batch)
        if isinstance(out, Tensor):
            return out, None
        loss, count = out
        if isinstance(count, Tensor):
            return loss, count.detach().float()
        return loss, torch.full((), float(count), device=loss.device)

    def backward(
        self, i: int, params: Params, out: Tensor, x: Tensor | None, g: Tensor
    ) -> tuple[Tensor | None, Params]:
        """Gradients of segment i with respect to its input x (a leaf, or None) and to its trainable parameters.

        A parameter that the output does not depend on has none, as in plain PyTorch; nor has one that is `resting`.
        """
        trainable = {n: params[n] for n in dict.fromkeys(self.segments[i].names.values()) if params[n].requires_grad}
        below = [x] if x is not None and x.requires_grad else []
        if not (below or trainable):
            return None, {}
        with self.observer.doing(f"backward of {self.labels[i]}", "backward"):
            leaves = [*below, *trainable.values()]
            grads: list[Tensor | None] = [None] * len(leaves)
            if out.requires_grad:
                grads = list(torch.autograd.grad(out, leaves, g, allow_unused=True))
            gx = grads.pop(0) if below else None
            if below and gx is None:
                gx = torch.zeros_like(below[0])
        self.observer.made("residual stream", [gx])
        self.observer.made("gradients", grads)
        found = zip(trainable, grads, strict=True)
        return gx, {name: own for name, own in found if own is not None and name not in self.resting}

    def head(self, params: Params, x: Tensor | None, batch: Batch, scale: Tensor, alone: bool = True) -> Head:
        """Loss and gradients of the last segment, a slice of tokens at a time, so that not all logits exist at once.

        `scale` multiplies a loss without a count, `alone` says that the step has no other micro-batch. Raises
        UsageError for a mean over one micro-batch of several.
        """
        with self.observer.doing("head", "head"):
            head = self._sliced(params, x, batch, scale) if self._slicing(x) else None
            if head is None:
                head = self._at_once(params, leaf(x), batch, scale, alone)
        self.observer.made("residual stream", [head.g])
        self.observer.made("gradients", head.grads.values())
        return head

    def _slicing(self, x: Tensor | None) -> bool:
        return x is not None and self.segments[-1].tokens

    def _at_once(self, params: Params, x: Tensor | None, batch: Batch, scale: Tensor, alone: bool) -> Head:
        loss, count = self._loss(params, x, batch)
        if count is None and not alone:
            raise UsageError(
                "the loss is a mean, and a mean of means over micro-batches with unequal numbers of targets is not the "
                "mean: return (sum, count) from the loss, two 0-d tensors, or use an accumulation of 1"
            )
        factor = scale if count is None else reciprocal(count) if alone else torch.ones_like(count)
        g, grads = self.backward(self.last, params, loss, x, factor.to(loss.dtype))
        return Head(loss.detach().float() * factor, None if alone else count, g, grads)

    def _sliced(self, params: Params, x: Tensor | None, batch: Batch, scale: Tensor) -> Head:
        assert x is not None
        flat, rows, places = _selected(x.detach(), batch)
        total, gx, grads, seen = torch.zeros_like(scale), torch.empty_like(flat), Params(), torch.zeros_like(scale)
        count: Tensor | None = None
        for part in self._parts(len(flat), x, places):
            piece = flat[part].requires_grad_()
            loss, count = self._loss(params, piece, {**batch, **{name: t[part] for name, t in rows.items()}})
            factor = scale if count is None else torch.ones_like(scale)
            g, own = self.backward(self.last, params, loss, piece, factor)
            assert g is not None
            gx[part] = g
            accumulate(grads, own, False, g, factor)
            total += loss.detach() * factor
            if count is not None:
                seen += count
        return Head(total, None if count is None else seen, _put_back(gx, x, places), grads)

    @torch.no_grad()
    def loss(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """In evaluation mode: (summed loss, valid targets), or (mean loss, 1) where the loss comes without a count."""
        return self.judged(params, batch, {})[:2]

    @torch.no_grad()
    def judged(
        self, params: Params, batch: Batch, judges: Mapping[str, Judge]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same, and what each of `judges` sums, uncompiled, over the slices that the last segment is given."""
        before = self.training
        self.train(False)
        try:
            with self.draws.of(Key(0)):
                return self._evaluated(params, batch, judges)
        finally:
            self.train(bool(before))

    def _judge(self, judge: Judge, params: Params, x: Tensor | None, batch: Batch) -> Tensor:
        if judge not in self._judging:
            self._judging[judge] = _make_forward(_Caller(self.segments[-1].module, judge).eval(), self._compute_dtype)
        own = {own: params[full] for own, full in self.segments[-1].names.items()}
        out, _ = self._judging[judge](own, x, batch, self.constant[-1], self.copied(self.last))
        assert isinstance(out, Tensor)
        return out

    def _evaluated(
        self, params: Params, batch: Batch, judges: Mapping[str, Judge]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x: Tensor | None = None
        for i in range(self.last):
            self.draws.seed(i)
            x = self.forward(i, params, x, batch)
        self.draws.seed(self.last)
        if x is None or not self._slicing(x):
            loss, count = self._loss(params, x, batch)
            said = {name: self._judge(judge, params, x, batch) for name, judge in judges.items()}
            return loss, torch.ones_like(loss) if count is None else count, said
        flat, rows, places = _selected(x, batch)
        parts = [
            (flat[part], {**batch, **{name: t[part] for name, t in rows.items()}})
            for part in self._parts(len(flat), x, places)
        ]
        found = [self._loss(params, *part) for part in parts]
        counts = [count for _, count in found if count is not None]
        count = torch.stack(counts).sum() if counts else valid([batch])
        said = {
            name: torch.stack([self._judge(judge, params, *part) for part in parts]).sum()
            for name, judge in judges.items()
        }
        return torch.stack([loss for loss, _ in found]).sum(), count, said

    def _parts(self, tokens: int, x: Tensor, places: Tensor | None) -> list[slice]:
        """range(tokens) cut for the head. Where they are selected from those of x, slices have one size whatever their
        number: `tokens` is then a multiple of an eighth of x's, or all that is cut is cut alike."""
        unit = x.shape[:-1].numel() // 8
        if places is None or not unit or tokens % unit:
            return self.slices(tokens)
        inner = self.slices(unit)
        return [slice(at + i.start, at + i.stop) for at in range(0, tokens, unit) for i in inner]

    def slices(self, tokens: int) -> list[slice]:
        """range(tokens) cut so that a slice has at most `logits` logits: equal slices where a nearby count allows it,
        because a ragged last one costs a graph of its own."""
        least = -(-tokens // max(1, self.logits // max(1, self.segments[-1].vocabulary)))
        count = next((n for n in range(least, min(2 * least, tokens) + 1) if tokens % n == 0), least)
        size = -(-tokens // count)
        return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def _several(segments: Sequence[Segment], kind: str) -> bool:
    """Are there several of this kind, so that one has to be numbered?"""
    return sum(s.kind == kind for s in segments) > 1


def valid(batches: Sequence[Batch]) -> Tensor:
    """The targets of these batches that are not IGNORED, 0-d."""
    return torch.stack([(batch["targets"] != IGNORED).sum() for batch in batches]).sum()


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, 0-d float32, or 0 where nothing was counted: nothing is learned from no targets."""
    return torch.where(count > 0, 1 / count, 0.0).float()


def _by_token(batch: Batch) -> Batch:
    """The fields that say something of each token, flattened: those whose shape begins as that of the targets."""
    shape = batch["targets"].shape
    return {name: t.flatten(0, len(shape) - 1) for name, t in batch.items() if t.shape[: len(shape)] == shape}


def _selected(x: Tensor, batch: Batch) -> tuple[Tensor, Batch, Tensor | None]:
    """Tokens (N, C) of x (..., C) for the head, the fields that say something of each, and which they are.

    They are all tokens (None); or, where the batch says which are supervised (B, k), of x (B, T, C) those.
    """
    fields = _by_token(batch)
    if SUPERVISED not in batch:
        return x.flatten(0, -2), fields, None
    offsets = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    places = (batch[SUPERVISED] + offsets).flatten()
    return x.flatten(0, -2)[places], {name: t[places] for name, t in fields.items() if name != SUPERVISED}, places


def _put_back(g: Tensor, x: Tensor, places: Tensor | None) -> Tensor:
    """Gradients (N, C) of what `_selected` took from x, as a gradient of x."""
    return g.view_as(x) if places is None else torch.zeros_like(x).flatten(0, -2).index_copy_(0, places, g).view_as(x)


def _state_names(segment: Segment) -> dict[str, str]:
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


def leaf(x: Tensor | None) -> Tensor | None:
    """x cut from its graph, ready to receive a gradient."""
    return None if x is None else x.detach().requires_grad_(x.is_floating_point())


def accumulate(held: Params, more: Params, safe: bool = True, *shared: Tensor | None) -> None:
    """Add gradients to those already held, in place.

    Unless it is `safe` to hold them as they are, because nothing will be written to them, a gradient that shares its
    memory with another one, with itself or with one of `shared` is copied first: of y = a + b both are one tensor.
    """
    taken = {t.untyped_storage()._cdata for t in shared if t is not None}
    for name, g in more.items():
        if name in held:
            held[name].add_(g)
            continue
        storage = g.untyped_storage()._cdata
        if not safe and (storage in taken or 0 in g.stride()):
            g = g.contiguous() if 0 in g.stride() and storage not in taken else g.clone()
        taken.add(storage)
        held[name] = g


class _Caller(nn.Module):
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


def _make_forward(caller: _Caller, compute_dtype: torch.dtype | None) -> Forward:
    def forward(
        params: Params, x: Tensor | None, batch: Batch, buffers: Params, state: Params
    ) -> tuple[Tensor | Loss, Params]:
        if compute_dtype is not None:
            params = {name: p.to(compute_dtype) for name, p in params.items()}
        given = {**params, **buffers, **{name: b.clone() for name, b in state.items()}}
        given = {f"module.{name}": t for name, t in given.items()}
        out: Tensor | Loss = functional_call(caller, given, (x, batch))
        # functional_call leaves in `given` what the module has put in a buffer's place
        return out, {name: given[f"module.{name}"].detach() for name in state}

    return forward
