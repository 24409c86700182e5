"""Memory by counting allocations, which is exact and the same on every run; and what the machine reports."""

import gc
import os
import resource
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def counted_peak(function: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once during `function`, above those alive when it starts.

    What only cycles keep alive is collected before, so that a collection meanwhile does not count as the function's.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its notes are no one's concern
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    results = record.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    alive = peak = 0
    for _, size in changes:
        alive += size
        peak = max(peak, alive)
    return peak


def peak_bytes(device: torch.device) -> int:
    """Peak so far: bytes allocated on a CUDA device, else the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
