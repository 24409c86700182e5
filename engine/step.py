"""One optimizer step: gradients from a chain of segments, each segment updated in place as they appear.

    mode "segments"   compiled segments and updates, gradients of one segment at a time
    mode "off"        the same, uncompiled

Both give the same numbers, with activations stored or recomputed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from optimizers.contract import PARKED, Hyper, Optimizer, Params, State, UsageError, part
from optimizers.random import Key, fold, word

from . import passes
from .bases import Missing
from .compile import compiled
from .kernel import Kernel, make_kernel
from .segments import Batch, Chain, Segment

Mode = Literal["segments", "off"]
Clip = Literal["none", "tensor", "global", "previous"]


class Result(NamedTuple):
    """Of a step: mean loss and global gradient norm before clipping (0-d float32), and what they are made of."""

    loss: Tensor
    norm: Tensor
    squares: list[tuple[tuple[str, ...], Tensor]]  # names of a segment's trained parameters, their squared norms
    refreshed: list[Tensor]  # a 0-d bool per rebuilt basis: was the gradient usable

    def first_nonfinite(self) -> str | None:
        """The first parameter, in the order of backward, whose gradient is not finite."""
        for names, squares in self.squares:
            for name, finite in zip(names, squares.isfinite().tolist(), strict=True):
                if not finite:
                    return name
        return None


class Step:
    """The training step of one model. Parameters and slots move in place; both may be read and saved between calls."""

    def __init__(
        self,
        segments: Sequence[Segment],
        params: Params,
        optimizer: Optimizer,
        state: State,
        *,
        mode: Mode = "segments",
        recompute: bool = False,
        clip: Clip = "none",
        clip_norm: float = 1.0,
        compute_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        logits: int = 2**24,
        key: Key = Key(0),  # noqa: B008 (an int)
    ) -> None:
        """`params` holds the tensors to train under the full names that the segments use; `key` is that of all draws.

        `clip`: "tensor" bounds each gradient's norm by `clip_norm`; "global" the norm of all, for which all must exist
        before the first update; "previous" scales by what the previous step's global norm asks for, at no cost in
        memory. Raises UsageError where segments and `params` do not name the same tensors.
        """
        self.chain = Chain(segments, mode == "segments", compute_dtype, logits)
        self.params, self.optimizer, self.state = params, optimizer, state
        shown = self.view()
        if set(self.chain.names) != shown.keys():
            raise UsageError(
                "segments and parameters name different tensors: "
                f"only the segments {sorted(set(self.chain.names) - shown.keys())[:3]}, "
                f"only the parameters {sorted(shown.keys() - set(self.chain.names))[:3]}"
            )
        self.mode, self.recompute, self.clip, self.key = mode, recompute, clip, key
        self.stochastic_rounding = stochastic_rounding
        self.device = next(iter(params.values())).device
        self.clip_norm = torch.tensor(clip_norm, device=self.device)
        self.previous = torch.tensor(0.0, device=self.device)  # the last step's norm; part of a run's state
        self.missing = Missing(optimizer.owner, state)
        self._kernels: dict[object, Kernel] = {}

    def __call__(self, batches: Sequence[Batch], hypers: Mapping[str, Hyper], step: int) -> Result:
        """Train on `batches`, the micro-batches of step `step`; `hypers` holds 0-d lr and weight_decay by group."""
        trainable, frozen = self.optimizer.view(self.params, self.state)
        everything = {**frozen, **trainable}
        for name, p in everything.items():
            p.requires_grad_(name in trainable)
        update = _Update(self, trainable, hypers, step)
        scales = self._scales(batches)
        run = passes.recomputed if self.recompute else passes.stored
        loss = run(self.chain, everything, batches, scales, update.use)
        return update.finish(loss)

    def view(self) -> Params:
        """The tensors that the segments see now, by the names that they use."""
        trainable, frozen = self.optimizer.view(self.params, self.state)
        return {**frozen, **trainable}

    @torch.no_grad()
    def turn(self, step: int) -> bool:
        """Change what is due before `step` (a mask, a subspace), one segment's parameters after another's.

        Those with state go first, so that what leaves is freed before what comes is allocated.
        """
        if not self.optimizer.turns(step):
            return False
        state: State = {}
        for names in sorted(self.chain.owned, key=lambda names: not part(self.state, names)):
            params = {name: self.params[name] for name in names if name in self.params}
            moved, own = self.optimizer.turn(params, part(self.state, params), step, self.key)
            for name, p in moved.items():
                if p is not params[name]:
                    params[name].copy_(p)
            for key in part(self.state, params):
                del self.state[key]
            state |= own
        order = [key for name in self.params for key in (name, PARKED + name) if key in state]
        self.state |= {key: state[key] for key in order}
        self.missing.look(self.state)
        return True

    def moved(self, names: Iterable[str]) -> list[str]:
        """The parameters that these gradients move."""
        return [self.optimizer.moves.get(name, name) for name in names]

    def _scales(self, batches: Sequence[Batch]) -> list[Tensor]:
        """What each micro-batch's loss is multiplied by: 1 / valid targets of the step, or 1 / count of means."""
        if not self.chain.segments[-1].tokens:
            return [torch.tensor(1 / len(batches), device=self.device)] * len(batches)
        valid = torch.stack([(batch["targets"] >= 0).sum() for batch in batches]).sum()
        return [(1 / valid.clamp(min=1)).float()] * len(batches)

    def kernel(self, names: tuple[str, ...]) -> Kernel:
        """The update of these parameters, shared by all sets of parameters with the same rules, shapes and dtypes."""
        rules = tuple(self.optimizer.owner[name].rule for name in names)
        kind = rules, tuple((self.params[n].shape, self.params[n].dtype) for n in names)
        if kind not in self._kernels:
            kernel = make_kernel(rules, _scaling(self.clip))
            self._kernels[kind] = kernel if self.mode == "off" else compiled(kernel)
        return self._kernels[kind]


class _Update:
    """The update half of one step: takes gradients as they come, rebuilds bases that are due, moves parameters."""

    def __init__(self, step: Step, trainable: Params, hypers: Mapping[str, Hyper], count: int) -> None:
        self.step, self.trainable, self.hypers, self.count = step, trainable, hypers, count
        moved = step.moved(trainable)
        self.due = set(step.optimizer.due(count)).intersection(moved)
        self.missing = step.missing.names().intersection(moved)
        self.squares: list[tuple[tuple[str, ...], Tensor]] = []
        self.refreshed: list[Tensor] = []
        self.waiting: list[Params] = []
        self.bound = step.clip_norm
        if step.clip == "previous":  # before the first step there is no norm, and no clipping
            self.bound = torch.where(step.previous > 0, step.clip_norm / (step.previous + 1e-6), 1.0).clamp(max=1)

    def use(self, grads: Params) -> None:
        """Move these parameters now; or, where the global norm decides by how much, once all gradients are here."""
        if grads and self.step.clip == "global":
            self.waiting.append(grads)
        elif grads:
            self._move(grads)

    def finish(self, loss: Tensor) -> Result:
        """Move what waited for the global norm, and report."""
        if self.waiting:
            squares = [g.float().square().sum() for grads in self.waiting for g in grads.values()]
            self.bound = (self.step.clip_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1)
            while self.waiting:
                self._move(self.waiting.pop(0))
        norm = torch.cat([s for _, s in self.squares]).sum().sqrt() if self.squares else torch.zeros_like(loss)
        self.step.previous = norm
        return Result(loss, norm, self.squares, self.refreshed)

    @torch.no_grad()
    def _move(self, grads: Params) -> None:
        names, state = self.step.moved(grads), self.step.state
        for name, g in zip(names, grads.values(), strict=True):
            if name in self.due or name in self.missing:
                rule = self.step.optimizer.owner[name].rule
                assert rule.refresh is not None, name
                key = fold(self.step.key, name, self.count)
                slots, ok = rule.refresh(g, state[name], key, name not in self.due)
                for slot, value in slots.items():
                    if value is not state[name][slot]:
                        state[name][slot].copy_(value)
                if name in self.due:
                    self.refreshed.append(ok)
                if name in self.missing:
                    self.step.missing.watch(name, state[name])
        owner = self.step.optimizer.owner
        held, hypers = [state[name] for name in names], [self.hypers[owner[name].name] for name in names]
        params = [self.step.params[name].detach() for name in names]
        kernel = self.step.kernel(tuple(names))
        squares = kernel(list(grads.values()), held, params, hypers, self.bound, self._seeds(names))
        self.squares.append((tuple(grads), squares))

    def _seeds(self, names: Sequence[str]) -> Tensor | None:
        """Of stochastic rounding, (len(names),) int32: for each tensor and step another one, and no pattern returns."""
        if not self.step.stochastic_rounding:
            return None
        words = [word(self.step.key, "rounding", name, self.count) for name in names]
        host = torch.tensor(words, dtype=torch.int32, pin_memory=self.step.device.type == "cuda")
        return host.to(self.step.device, non_blocking=True)


def _scaling(clip: Clip) -> Literal["none", "tensor", "scale"]:
    """What the kernel does with its bound."""
    return "none" if clip == "none" else "tensor" if clip == "tensor" else "scale"
