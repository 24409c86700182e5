"""One optimizer step: gradients from a chain of segments, each segment updated in place as they appear.

    mode "segments"   compiled segments and updates, gradients of one segment at a time
    mode "off"        the same, uncompiled

Both give the same numbers, with activations stored or recomputed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from optimizers.apply import Bound
from optimizers.clock import Clocks
from optimizers.compile import compiled
from optimizers.contract import Hyper, Optimizer, Params, State, UsageError
from optimizers.kernel import Kernel, Seeds, make_kernel, rebuild_in_place
from optimizers.missing import Missing
from optimizers.random import Key, fold

from . import backward
from .gradients import reciprocal
from .observer import Observer
from .processes import ALONE, Processes
from .randomness import Draws
from .segments import Batch, Chain, Segment
from .tokens import valid

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
        observer: Observer | None = None,
        compiler: Callable[[Any], Any] = compiled,
        processes: Processes = ALONE,
    ) -> None:
        """`params` holds the tensors to train under the full names that the segments use; `key` is that of all draws.

        `clip`: "tensor" bounds each gradient's norm by `clip_norm`; "global" the norm of all, for which all must exist
        before the first update; "previous" scales by what the previous step's global norm asks for, at no cost in
        memory. `observer` is told what the step does; `compiler` is what mode "segments" compiles with. A parameter
        that no group owns is frozen: the segments see it, and nothing moves it. Of several `processes` each makes such
        a step, from equal weights and with equal settings, and trains on its own micro-batches of the step.

        Raises UsageError where segments and `params` do not name the same tensors, and for a parameter that requires a
        gradient and is owned by nobody; with several processes, for buffers that training changes.
        """
        self.device = next(iter(params.values())).device
        self.observer, self.compiler = observer or Observer(), compiler if mode == "segments" else None
        draws = Draws(self.device)
        self.chain = Chain(segments, self.compiler, compute_dtype, logits, draws, self.observer)
        self.buffers = self.chain.state  # those that are state, by full names: saved with the parameters
        self.params, self.optimizer, self.state = params, optimizer, state
        self.singly = optimizer.singly
        shown = self.tensors()
        if set(self.chain.names) != shown.keys():
            raise UsageError(
                "segments and parameters name different tensors: "
                f"only the segments {sorted(set(self.chain.names) - shown.keys())[:3]}, "
                f"only the parameters {sorted(shown.keys() - set(self.chain.names))[:3]}"
            )
        lost = [n for n, p in params.items() if n not in optimizer.owner and p.requires_grad and _is_parameter(p)]
        if lost:
            raise UsageError(
                f"parameter {lost[0]!r} requires a gradient, and is owned by no group of the optimizer; give it one, "
                "or freeze it with requires_grad_(False)"
            )
        if self.buffers and processes.world > 1:
            raise UsageError(
                f"buffer {next(iter(self.buffers))!r} changes in training, and would differ from process to process; "
                "such a model, with batch norms for example, trains in one process only"
            )
        self.processes, self.agreed = processes, processes.world == 1
        self.recompute, self.clip, self.key = recompute, clip, key
        self.stochastic_rounding, self.seeds = stochastic_rounding, Seeds(key, self.device)
        groups = {group.name: group for group in optimizer.owner.values()}
        self.hypers: dict[str, Hyper] = {
            name: {
                "lr": torch.full((), float(group.lr), device=self.device),
                "weight_decay": torch.full((), float(group.weight_decay), device=self.device),
            }
            for name, group in groups.items()
        }
        self.count = 0  # the step that comes next
        self.clip_norm = torch.tensor(clip_norm, device=self.device)
        self.previous = torch.tensor(0.0, device=self.device)  # the last step's norm; part of a run's state
        self.missing = Missing(optimizer.owner, state)
        self._kernels: dict[object, Kernel] = {}
        self.clocks = Clocks()

    def __call__(
        self, batches: Sequence[Batch], hypers: Mapping[str, Hyper] | None = None, step: int | None = None
    ) -> Result:
        """Train on `batches`, the micro-batches of step `step` (by default the one after the last). Of several
        processes, number r of n has those at the places r, r + n, ... of all, at least one.

        `hypers` holds 0-d lr and weight_decay by group, or some of them: the others are the groups' own. Raises
        UsageError for a group that is not there, and for a loss that does not add over several micro-batches.
        With several processes the first call raises it where they do not train the same.
        """
        if not self.agreed:
            self._agree()
        step = self.count if step is None else step
        trainable, frozen = self._seen()
        self.chain.resting = frozenset(name for name, p in frozen.items() if p.requires_grad)
        update = _Update(self, trainable, self._hypers(hypers or {}), step)
        run = backward.recomputed if self.recompute else backward.stored
        self.chain.train()
        with self.chain.draws.of(fold(self.key, "forward", step)):
            seen = {**frozen, **trainable}
            loss = run(self.chain, seen, batches, self._scale(batches), update.use, self.processes)
        self.count = step + 1
        return update.finish(loss)

    def watch(self, observer: Observer) -> None:
        """Tell this observer, and no other one, what the steps from now on do."""
        self.observer = self.chain.observer = observer

    def _agree(self) -> None:
        """Raises UsageError where another process trains something else. Waits for the device."""
        owner = self.optimizer.owner
        said = {
            "torch": torch.__version__,
            "the model": [(name, tuple(p.shape), str(p.dtype)) for name, p in self.params.items()],
            "the optimizer": [(n, g.name, g.rule.name, g.rule.options, g.lr, g.weight_decay) for n, g in owner.items()],
            "clipping": (self.clip, self.clip_norm.item()),
            "the seed": (int(self.key), self.stochastic_rounding),
            "the sum of weights": torch.stack([p.detach().double().sum() for p in self.params.values()]).tolist(),
        }
        self.processes.agree(said, self.device)
        self.agreed = True

    def _seen(self) -> tuple[Params, Params]:
        """The tensors that train now and those that do not, by the names that the segments use.

        They are aliases: flags of the user's own parameters stay as they are. Those of the latter that `_resting` names
        ask for gradients too.
        """
        trainable, frozen = self.optimizer.split(self.params, self.state)
        held = {name for name in trainable if name in self.params and name not in self.optimizer.owner}
        still = {**frozen, **{name: trainable[name] for name in held}}
        moving = {name: p for name, p in trainable.items() if name not in held}
        resting = self._resting(moving, still) if self.compiler and self.singly else ()
        return (
            {name: p.detach().requires_grad_() for name, p in moving.items()},
            {name: p.detach().requires_grad_(name in resting) for name, p in still.items()},
        )

    def _resting(self, trainable: Params, frozen: Params) -> set[str]:
        """What rests singly in segments in which something trains, by the names that have the gradients. A tied tensor
        is not among them where another segment that has it rests altogether."""
        stood_for = {self.optimizer.parameter_of(name) for name in frozen if name not in self.params}
        idle: set[str] = set()
        for segment in self.chain.segments:
            names = segment.names.values()
            if not any(name in trainable for name in names):
                idle |= set(names)
        return {n for n in frozen if self.optimizer.parameter_of(n) in self.singly and n not in stood_for | idle}

    def _hypers(self, given: Mapping[str, Hyper]) -> Mapping[str, Hyper]:
        if odd := given.keys() - self.hypers.keys():
            raise UsageError(f"hypers: got a group {min(odd)!r}, expected some of {sorted(self.hypers)}")
        return {name: {**own, **given[name]} if name in given else own for name, own in self.hypers.items()}

    def tensors(self) -> Params:
        """The tensors that the segments see now, by the names that they use."""
        trainable, frozen = self._seen()
        return {**frozen, **trainable}

    @torch.no_grad()
    def switch(self, step: int) -> bool:
        """Change what is due before `step` (a mask, a subspace), one segment's parameters after another's.

        Those with state go first, so that what leaves is freed before what comes is allocated.
        """
        if not self.optimizer.switches(step):
            return False
        shared = self.optimizer.choose({key: self.state.pop(key) for key in self.optimizer.shared}, step)
        state: State = {}
        for names in sorted(self.chain.owned, key=lambda names: not any(name in self.state for name in names)):
            params = {name: self.params[name] for name in names if name in self.params}
            own = {name: self.state.pop(name) for name in params if name in self.state}
            moved, own = self.optimizer.switch(params, own | shared, step, self.key)
            for name, p in moved.items():
                if p is not params[name]:
                    params[name].copy_(p)
            state |= own
        self.state |= {name: state[name] for name in self.params if name in state} | shared
        self.missing.look(self.state)
        return True

    def moved(self, names: Iterable[str]) -> list[str]:
        """The parameters that these gradients move."""
        return [self.optimizer.parameter_of(name) for name in names]

    def _scale(self, batches: Sequence[Batch]) -> Tensor:
        """What a loss without a count is multiplied by: 1 / valid targets of the step, or 1 for a mean."""
        if not self.chain.segments[-1].tokens:
            return torch.ones((), device=self.device)
        return reciprocal(self.processes.total(valid(batches)))

    def kernel(self, names: tuple[str, ...]) -> Kernel:
        """The update of these parameters, shared by all sets of parameters with the same rules, shapes and dtypes."""
        rules = tuple(self.optimizer.owner[name].rule for name in names)
        kind = rules, tuple((self.params[n].shape, self.params[n].dtype) for n in names)
        if kind not in self._kernels:
            kernel = make_kernel(rules, _scaling(self.clip), self.stochastic_rounding)
            self._kernels[kind] = self.compiler(kernel) if self.compiler else kernel
        return self._kernels[kind]


class _Update:
    """The update half of one step: takes gradients as they come, rebuilds bases that are due, moves parameters."""

    def __init__(self, step: Step, trainable: Params, hypers: Mapping[str, Hyper], count: int) -> None:
        self.step, self.trainable, self.hypers, self.count = step, trainable, hypers, count
        moved = step.moved(trainable)
        self.due = set(step.optimizer.due(count, step.state)).intersection(moved)
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
            norms = torch._foreach_norm([g for grads in self.waiting for g in grads.values()], 2, torch.float32)
            self.bound = (self.step.clip_norm / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
            while self.waiting:
                self._move(self.waiting.pop(0))
        norm = torch.cat([s for _, s in self.squares]).sum().sqrt() if self.squares else torch.zeros_like(loss)
        self.step.previous = norm
        self._tell()
        return Result(loss, norm, self.squares, self.refreshed)

    @torch.no_grad()
    def _tell(self) -> None:
        """Let the optimizer see the norms, where it keeps something of them."""
        optimizer, state = self.step.optimizer, self.step.state
        if not optimizer.shared:
            return
        seen = [(self.step.moved(names), values) for names, values in self.squares]
        for key, slots in optimizer.observe({key: state[key] for key in optimizer.shared}, seen).items():
            for slot, value in slots.items():
                if value is not state[key][slot]:
                    state[key][slot].copy_(value)

    @torch.no_grad()
    def _move(self, grads: Params) -> None:
        names, state = self.step.moved(grads), self.step.state
        for name, g in zip(names, grads.values(), strict=True):
            if name in self.due or name in self.missing:
                rule, missing = self.step.optimizer.owner[name].rule, name not in self.due
                with self.step.observer.doing("refresh", "refresh"):
                    ok = rebuild_in_place(rule, name, g, state[name], self.count, self.step.key, missing)
                if name in self.due:
                    self.refreshed.append(ok)
                if name in self.missing:
                    self.step.missing.watch(name, state[name])
        alone = [t for t, name in zip(grads, names, strict=True) if name in self.step.singly]
        together = {trained: g for trained, g in grads.items() if trained not in alone}
        for part in ([together] if together else []) + [{trained: grads[trained]} for trained in alone]:
            self._apply(part)

    def _apply(self, grads: Params) -> None:
        """Move these parameters by one kernel."""
        names, state, owner = self.step.moved(grads), self.step.state, self.step.optimizer.owner
        held, hypers = [state[name] for name in names], [self.hypers[owner[name].name] for name in names]
        params = [self.step.params[name].detach() for name in names]
        kernel = self.step.kernel(tuple(names))
        with self.step.observer.doing("update", "update"):
            drawing = self.step.stochastic_rounding or any(owner[name].rule.draws for name in names)
            seed = self.step.seeds.at(tuple(names), self.count) if drawing else None
            clocks, bare = self.step.clocks.of(names, [owner[name].rule for name in names], held)
            squares = kernel(list(grads.values()), bare, params, hypers, self.bound, seed, clocks)
        self.squares.append((tuple(grads), squares))


def _is_parameter(p: Tensor) -> bool:
    """Does `p` belong to a module, so that its flag says whether it is to be trained?"""
    return isinstance(p, nn.Parameter)


def _scaling(clip: Clip) -> Bound:
    """What the kernel does with its bound."""
    return "none" if clip == "none" else "tensor" if clip == "tensor" else "scale"
