"""The rows: correctness, waits, speed, memory, saving, resuming."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint
from engine.arithmetic import arithmetic
from engine.checkpoint.saver import Saver
from engine.config import RunConfig
from engine.memory import counted_peak
from engine.planner.plan import Built, plan
from engine.step.segments import cut
from engine.step.step import Step
from optimizers.contract import total_bytes

from . import sides
from .rows import Row


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Let go of what the row before held."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def agrees(method: str, device: torch.device, steps: int = 5) -> Row:
    """Ordinary steps here and on the CPU in fp32 from the same weights and state: how far the weights are apart, over
    how far they went."""
    here = sides.step(method, "toy", torch.device("cpu"), torch.float32, mode="off")
    given = sides.batch("toy", torch.device("cpu"), 32)
    here([given], step=0)
    there = sides.step(method, "toy", device, torch.float32, mode="off")
    for name, p in there.params.items():
        p.data.copy_(here.params[name])
    for name, slots in there.state.items():
        for slot, t in slots.items():
            t.copy_(here.state[name][slot])
    start = {name: p.detach().clone() for name, p in here.params.items()}
    for i in range(1, steps + 1):
        here([given], step=i)
        there([{name: t.to(device) for name, t in given.items()}], step=i)
    with torch.no_grad():
        apart = torch.stack([(p.cpu() - here.params[name]).norm() for name, p in there.params.items()]).norm()
        went = torch.stack([(p - start[name]).norm() for name, p in here.params.items()]).norm()
    return {"apart over gone": float(apart / went), "steps": steps}


def waits(method: str, device: torch.device, precision: str) -> Row:
    """Does an ordinary step wait? CUDA itself says so."""
    if device.type != "cuda":
        return {"not measured": "no CUDA"}
    dtype = torch.float32 if precision in ("fp32", "mixed") else torch.bfloat16
    options: dict[str, Any] = {"stochastic_rounding": precision == "bf16-sr"}
    options["compute_dtype"] = torch.bfloat16 if precision == "mixed" else None
    made = sides.step(method, "60m", device, dtype, **options)
    given = [sides.batch("60m", device, 2048)]
    for i in range(3):
        made(given, step=i)
    synchronize(device)
    at = next(i for i in range(3, 500) if not made.optimizer.due(i, made.state) and not made.optimizer.switches(i))
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(given, step=at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


def speed(run: Callable[[], object], size: str, device: torch.device, tokens: int, seconds: float = 5) -> Row:
    """Tokens a second of a step, over at least five steps after three that compile; MFU where the peak is known."""
    for _ in range(3):
        run()
    synchronize(device)
    taken: list[float] = []
    while len(taken) < 5 or (sum(taken) < seconds and len(taken) < 200):
        began = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    median, peak = statistics.median(taken), sides.peak_flops(device)
    found = {"ms": median * 1e3, "tokens/s": tokens / median, "slowest over median": max(taken) / median}
    return found | ({} if peak is None else {"MFU": sides.flops(size, tokens) / median / peak})


def memory(method: str, size: str, device: torch.device, tokens: int, recompute: bool) -> Row:
    """The peak of two steps, allocated and reserved, and what the plan says of them."""
    bare, cpu = sides.bare(size), torch.device("cpu")
    chosen = sides.optimizer(method, bare, size)

    def built() -> Built:
        bare.allocate(cpu)
        params: dict[str, Tensor] = {name: p for name, p in bare.named_parameters() if not p.is_meta}
        return Built(cut(bare), params, chosen, lambda rows: sides.batch(size, cpu, tokens))

    config = RunConfig(precision="bf16", recompute=recompute, micro_batch=1)
    planned = plan(built, config, device.type)
    own = planned.bytes - planned.kinds.get("CUDA context (assumed)", 0)
    made = sides.step(method, size, device, recompute=recompute)
    given = [sides.batch(size, device, tokens)]

    def run() -> None:
        for i in range(2):
            made(given, step=i)

    if device.type != "cuda":
        held = sum(p.nbytes for p in made.params.values()) + total_bytes(made.state)
        return {"planned GiB": own / 2**30, "counted GiB": (held + counted_peak(run)) / 2**30}
    run()
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"planned GiB": own / 2**30, "allocated GiB": allocated / 2**30, "reserved GiB": reserved / 2**30}


def saving(method: str, size: str, device: torch.device) -> Row:
    """How long training stands still for a save that is written beside it."""
    made = sides.step(method, size, device, mode="off")
    held = sum(p.nbytes for p in made.params.values()) + total_bytes(made.state)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), 1, 0, background=True)
        synchronize(device)
        began = time.perf_counter()
        saver.save(1, made.params, made.state, {}, {}, {})
        stalled = time.perf_counter() - began
        error = saver.wait()
    return {
        "GB": held / 1e9,
        "stalled s": stalled,
        "written s": time.perf_counter() - began,
        "refused": str(error or ""),
    }


def resumes(method: str, device: torch.device, size: str, steps: int = 6) -> Row:
    """With --deterministic: is a run that is stopped and resumed equal to the bit to one that is not?"""

    def go(made: Step, first: int, last: int) -> None:
        for i in range(first, last):
            torch.manual_seed(i)
            given = [sides.batch(size, torch.device("cpu"), 2048)]
            made([{name: t.to(device) for name, t in one.items()} for one in given], step=i)

    with arithmetic(RunConfig(deterministic=True)), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        straight = sides.step(method, size, device)
        go(straight, 0, steps // 2)
        path = checkpoint.save(Path(folder), steps // 2, straight.params, straight.state, {}, {})
        go(straight, steps // 2, steps)
        again, saved = sides.step(method, size, device), checkpoint.load(path)
        checkpoint.restore_into(again.params, saved.params)
        for name, slots in again.state.items():
            for slot, t in slots.items():
                t.copy_(saved.state[name][slot])
        go(again, steps // 2, steps)
    differ = [name for name, p in straight.params.items() if not torch.equal(p, again.params[name])]
    return {"equal to the bit": not differ, "first that differs": next(iter(differ), "")}
