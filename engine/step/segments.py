"""A model as a chain of segments, run forward and backward one segment at a time.

Segments of one kind share a template module and so one compiled graph: the template is called with each segment's own
parameters (`torch.func.functional_call`). The residual stream is cut between segments, so backward through one of
them needs nothing of the others, and its gradients can be used and freed before the next one's exist.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.segment import Batch as Batch
from models.segment import Loss
from models.segment import Segment as Segment
from optimizers.contract import Params, UsageError
from optimizers.random import Key

from . import templates, tokens
from .forwards import Caller, Compiler, Forward, make_forward, state_names
from .gradients import Head, accumulate, leaf, reciprocal
from .observer import Observer
from .randomness import Draws

Objective = Callable[[nn.Module, Batch], Tensor | Loss]
Judge = Callable[[nn.Module, Tensor | None, Batch], Tensor]  # of the last segment's module and input: a sum, 0-d


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
        self.segments, self.last = segments, len(segments) - 1
        self.most_tokens = max(1, logits // max(1, segments[-1].vocabulary))  # that the head is given at once
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
                caller = Caller(segment.module, segment.call)
                self._modes += [(m, m.training or not whole) for m in caller.module.modules()]
                forward = make_forward(caller, compute_dtype)
                self.forwards[kind] = compiler(forward) if compiler else forward
        self.train()
        self.resting: frozenset[str] = frozenset()  # whose gradients are computed beside others', and let go at once
        buffers = [dict(segment.module.named_buffers()) for segment in segments]
        full = [state_names(segment) for segment in segments]
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
        # the shape of this field changes, that of no segment does
        batch = {name: t for name, t in batch.items() if name != tokens.SUPERVISED}
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
        flat, rows, places = tokens.selected(x.detach(), batch)
        total, gx, grads, seen = torch.zeros_like(scale), torch.empty_like(flat), Params(), torch.zeros_like(scale)
        count: Tensor | None = None
        for part in tokens.parts(len(flat), x, places, self.most_tokens):
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
        return Head(total, None if count is None else seen, tokens.put_back(gx, x, places), grads)

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
            self._judging[judge] = make_forward(Caller(self.segments[-1].module, judge).eval(), self._compute_dtype)
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
        flat, rows, places = tokens.selected(x, batch)
        parts = [
            (flat[part], {**batch, **{name: t[part] for name, t in rows.items()}})
            for part in tokens.parts(len(flat), x, places, self.most_tokens)
        ]
        found = [self._loss(params, *part) for part in parts]
        counts = [count for _, count in found if count is not None]
        count = torch.stack(counts).sum() if counts else tokens.valid([batch])
        said = {
            name: torch.stack([self._judge(judge, params, *part) for part in parts]).sum()
            for name, judge in judges.items()
        }
        return torch.stack([loss for loss, _ in found]).sum(), count, said


def _several(segments: Sequence[Segment], kind: str) -> bool:
    """Are there several of this kind, so that one has to be numbered?"""
    return sum(s.kind == kind for s in segments) > 1
