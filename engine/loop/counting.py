"""One step with every allocation counted, to compare with the planner's prediction."""

from collections.abc import Callable

from ..memory import counted_peak, peak_bytes
from ..step.step import Result, Step


def counted(step: Step, run: Callable[[], Result]) -> tuple[Result, int]:
    """What `run` gives, and the most bytes of tensors at once in it, with weights, state and buffers. On CUDA: the peak
    of the process so far."""
    if step.device.type == "cuda":
        result = run()
        return result, peak_bytes(step.device)
    there = [*step.params.values(), *(t for slots in step.state.values() for t in slots.values())]
    there += [b for segment in step.chain.segments for b in segment.module.buffers()]
    sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in there)}
    results: list[Result] = []
    kept = step.previous  # it dies in the step, and torch warns of memory that was there before it began to count
    peak = counted_peak(lambda: results.append(run()))
    del kept
    return results[0], sum(sizes.values()) + peak
