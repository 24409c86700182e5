"""The metrics of a task on its held-out rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..step.segments import Batch
from ..step.step import Step
from ..task import Collected, Sums, Task, add


def evaluate(task: Task, step: Step, count: int) -> dict[str, float]:
    """The metrics with the weights as they are now, `count` rows at a time. The device is read once, at the end."""
    sums: Sums = {}
    params = step.tensors()
    for batch in task.evaluation(count):
        add(sums, task.evaluate(step.chain, params, to_device(batch, step.device)))
    return task.report(on_host(sums))


def on_host(sums: Sums) -> Sums:
    """Float64 sums, by one copy."""
    rows = {name: one.rows if isinstance(one, Collected) else one for name, one in sums.items()}
    flat = torch.cat([t.double().flatten() for t in rows.values()]).cpu()
    parts = torch.split(flat, [t.numel() for t in rows.values()])
    found = {name: part.view(t.shape) for (name, t), part in zip(rows.items(), parts, strict=True)}
    return {name: Collected(t) if isinstance(sums[name], Collected) else t for name, t in found.items()}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """A batch where the model is; the host does not wait for the copy."""
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}
