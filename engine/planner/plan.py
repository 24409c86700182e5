"""The memory of a training run, known before any of it is allocated: the engine's own step, run on fake tensors.

Weights, optimizer state and step are built as for training, without memory, and a `Tally` counts what would be alive
when. Nothing here repeats what the step, an optimizer or a model does, so nothing has to be kept equal to them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers.contract import Optimizer, Params, State
from optimizers.random import Key

from ..config import RunConfig, step_options
from ..step.observer import Observer
from ..step.segments import Batch, Segment
from ..step.step import Step
from .storages import Peak, Tally

CONTEXT = 500 * 2**20  # what a CUDA context and its libraries take beside tensors; an assumption, it differs by device
ANSWERED = {torch.bool: True, torch.float32: 1.0}  # by the type of a tensor, when the host asks for its value
KNOWN = (torch.bool, torch.int64, torch.float64)  # types of what the host makes for itself
LAYERS = 2**12  # more things than masks choose among, fewer than a tensor has entries
SIMULATED = 3  # micro-batches that are really run; each one more adds the same
WEIGHTS, STATE = "weights", "optimizer state: "


class Built(NamedTuple):
    """What a run trains, built on fake tensors; `batch(rows)` is a batch as its task gives it, whatever is in it."""

    segments: Sequence[Segment]
    params: Params
    optimizer: Optimizer
    batch: Callable[[int], Batch]
    key: Key = Key(0)  # of the optimizer's draws


class Plan(NamedTuple):
    """Predicted bytes: the peak, the moment it is reached at, and by kind what is alive then.

    `moments` holds the peak of every moment; `state` and `weights` what is there all the time, before the first step.
    """

    bytes: int
    moment: str
    kinds: dict[str, int]
    moments: dict[str, int]
    weights: int
    state: int


def plan(build: Callable[[], Built], config: RunConfig, device: str = "cpu", steps: Sequence[int] = ()) -> Plan:
    """The most that a run of `config` holds in tensors at `steps`; without any, from its start-up to its last save, the
    steps being the first one, which builds all bases, and the first that switches.

    `build` is called under a FakeTensorMode. For "cuda", storages are rounded up to 512 bytes and `CONTEXT` is added;
    library calls are taken to need the workspace that they need on the CPU. Raises what `build` and the step raise.
    """
    count = config.accumulation
    counts = [count] if count <= SIMULATED else [SIMULATED - 1, SIMULATED]
    found, beside, state = _simulated(build, config, device, steps, counts)
    peaks = found[-1]
    if count > SIMULATED:
        peaks = {m: _grown(found[0].get(m, Peak(0, {})), p, count - SIMULATED) for m, p in peaks.items()}
    if not steps:
        peaks |= beside
    moment = max(peaks, key=lambda m: peaks[m].bytes)
    kinds = {kind: n for kind, n in peaks[moment].kinds.items() if n}
    context = {"CUDA context (assumed)": CONTEXT} if device == "cuda" else {}
    moments = {m: p.bytes + sum(context.values()) for m, p in peaks.items()}
    return Plan(moments[moment], moment, kinds | context, moments, kinds[WEIGHTS], state)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """What `model.to(dtype)` does to parameters; that refuses fake tensors which anybody refers to."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.to(dtype), p.requires_grad))


def _grown(few: Peak, more: Peak, times: int) -> Peak:
    """The peak of a moment with `times` micro-batches more, each of which adds what the last one added."""
    kinds = {kind: n + times * (n - few.kinds.get(kind, 0)) for kind, n in more.kinds.items()}
    return Peak(sum(kinds.values()), kinds)


def _simulated(
    build: Callable[[], Built], config: RunConfig, device: str, steps: Sequence[int], counts: Sequence[int]
) -> tuple[list[dict[str, Peak]], dict[str, Peak], int]:
    """Peaks by moment of `steps` with each of these numbers of micro-batches; those of what a run does beside them; and
    the bytes of the fresh state."""
    cuda = device == "cuda"
    tally = Tally((lambda n: -(-n // 512) * 512) if cuda else (lambda n: n))
    with FakeTensorMode(allow_non_fake_inputs=True), _Drawn():  # type: ignore[no-untyped-call]
        segments, params, optimizer, batch, key = build()
        tally.adopt(WEIGHTS, [*params.values(), *(b for s in segments for b in s.module.buffers())])
        with tally, tally.doing("start-up", "start-up workspace"):
            state = optimizer.init(params, steps[0] if steps else 0)  # what has state may depend on the step
            _each(tally.name, state, optimizer)
        beside = {"start-up": tally.peaks()["start-up"], "resume": tally.present()}
        fresh = sum({id(t): t.untyped_storage().nbytes() for _, t in _slots(state, optimizer)}.values())
        step = Step(
            segments,
            params,
            optimizer,
            state,
            key=key,
            observer=_Watching(tally),
            compiler=_counted(tally),
            **step_options(config, device),
        )
        groups = {group.name for group in optimizer.owner.values()}
        hypers = {name: {key: torch.zeros(()) for key in ("lr", "weight_decay")} for name in groups}
        found = []
        for count in counts:
            batches = [batch(config.micro_batch) for _ in range(count)]
            tally.adopt("batch", (t for one in batches for t in one.values()))
            before = tally.events()
            for i in steps or _telling(optimizer, config.steps):
                with tally, tally.doing("switch", "switch workspace"):
                    step.switch(i)
                    _each(tally.name, step.state, optimizer)
                with tally:
                    step(batches, hypers, i)
            found.append(tally.peaks(before))
            del batches
        if not steps:
            evaluation = _evaluation(step, tally, batch(config.micro_batch))
            beside |= {"evaluation": evaluation, "saving": _saving(step, tally, config, cuda)}
    return found, beside, fresh


def _counted(tally: Tally) -> Callable[[Any], Any]:
    """What stands in for torch.compile, whose parts load slowly: where nothing compiles they are not needed."""

    def compiler(function: Any) -> Any:
        from .graphs import fused

        return fused(function, tally)

    return compiler


def _evaluation(step: Step, tally: Tally, batch: Batch) -> Peak:
    """The peak of an evaluation, whatever its moments."""
    before = tally.events()
    tally.adopt("batch", batch.values())
    with tally:
        step.chain.loss(step.tensors(), batch)
    return max(tally.peaks(before).values(), key=lambda peak: peak.bytes)


def _saving(step: Step, tally: Tally, config: RunConfig, cuda: bool) -> Peak:
    """The peak of a save: weights are looked at and written one at a time. What is written in the background is copied
    to the host first, which on the CPU is the memory that the run trains in."""
    before = tally.events()
    with tally, tally.doing("saving", "saving workspace"), torch.no_grad():
        for name, p in step.params.items():
            p.isfinite().all()
            step.optimizer.merge({name: p}, {name: step.state[name]} if name in step.state else {})
        if not cuda and config.save_async == "on":
            copies = [t.clone() for t in (*step.params.values(), *(t for _, t in _slots(step.state, step.optimizer)))]
            tally.name("copy for the disk", copies)
            del copies
    return tally.peaks(before)["saving"]


class _Drawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the host decides by is real: short permutations, and short tensors that it makes of its own numbers, such as
    what trains now. What it asks of another tensor, such as whether a basis must be rebuilt, is answered with yes; and
    all norms are 1."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo runs under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.randperm.generator and args[0] <= LAYERS:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype in ANSWERED:
            return ANSWERED[args[0].dtype]
        if func is torch.ops.aten.lift_fresh.default and args[0].dtype in KNOWN and args[0].numel() <= LAYERS:
            return args[0]
        return func(*args, **(kwargs or {}))


def _telling(optimizer: Optimizer, total: int) -> list[int]:
    """The first step, which does all that any step does but switch, and the first that switches."""
    return [0, *[i for i in range(1, min(total, 100_000)) if optimizer.switches(i)][:1]]


def _slots(state: State, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state with its kind, as its rule declares it."""
    for key, slots in state.items():
        kinds = {slot.name: slot.kind for slot in optimizer.declared(key)}
        for name, t in slots.items():
            yield STATE + kinds[name], t


def _each(tell: Callable[[str, list[Tensor]], None], state: State, optimizer: Optimizer) -> None:
    """Tell the kind of each; in a frame of its own, as a name left on a tensor would keep what a switch lets go."""
    for kind, t in _slots(state, optimizer):
        tell(kind, [t])


class _Watching(Observer):
    """Tells the tally what a step is doing, and what becomes of the tensors that it makes."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    @contextmanager
    def doing(self, moment: str, part: str) -> Iterator[None]:
        mark = self.tally.mark()
        with self.tally.doing(moment, f"{part} workspace" if part in ("refresh", "update") else "workspace"):
            yield
        if part == "forward":
            self.tally.name_since(mark, "activations")

    def made(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        self.tally.name(kind, tensors)
