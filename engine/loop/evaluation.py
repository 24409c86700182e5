"""The metrics of a task on its held-out rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..step.segments import Batch
from ..step.step import Step
from ..task import Sums, Task, add


def evaluate(task: Task, step: Step, count: int) -> dict[str, float]:
    """The task's metrics with the weights as they are now, `count` rows at a time."""
    sums: Sums = {}
    params = step.tensors()
    for batch in task.evaluation(count):
        add(sums, task.evaluate(step.chain, params, to_device(batch, step.device)))
    return task.report(sums)


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """A batch where the model is; the host does not wait for the copy."""
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}
