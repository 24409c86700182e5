"""Several processes that train one model: what a step asks of the others.

A process of several holds all weights and all state, and runs its own micro-batches of a step. Sums go over processes:
targets, losses, and the gradients of a segment, which are on their way while the segment before goes backward. Every
process then makes the same update from the same gradients, so norms, clipping, refreshes, masks and turns need nothing
more. A process alone is `ALONE`, and asks nobody.

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))             one process of `torchrun`
    step = Step(segments, params, optimizer, state, processes=Replicas())
    step(batches[processes.rank :: processes.world])                           its micro-batches of all of the step's
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers.contract import Params, UsageError

Arriving = Callable[[], Params]  # waits for gradients that are on their way


class Processes(Protocol):
    """`world` processes, of which this is number `rank`. All call the same methods in the same order."""

    rank: int
    world: int

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""

    def reduce(self, grads: Params) -> Arriving:
        """Begin to sum gradients, of the same names everywhere, over all processes, in place."""

    def agree(self, said: Mapping[str, object], device: torch.device) -> None:
        """Raises UsageError, in every process, where one says something else than the others."""


class Alone:
    """The only process."""

    rank, world = 0, 1

    def total(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, grads: Params) -> Arriving:
        return lambda: grads

    def agree(self, said: Mapping[str, object], device: torch.device) -> None:
        pass


class Replicas:
    """Processes of a group of torch.distributed, each with a whole copy of the model and of the optimizer's state.

    On CUDA, nothing here waits for the device but `agree`. That the group is there, of the backend that goes with the
    model's device, and that it ends calls that take too long (its `timeout`), is the caller's.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group` is the default one where it is None. Raises UsageError where there is none."""
        if not dist.is_initialized():
            raise UsageError(
                "Replicas: got no process group, expected one of torch.distributed; start the program with torchrun, "
                "and call torch.distributed.init_process_group first"
            )
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.reduced_bytes = 0  # of gradients that this process had summed

    def total(self, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def reduce(self, grads: Params) -> Arriving:
        """Sums are float32 at least: what is held in bfloat16 is exact, a sum of several would not be."""
        sums: Params = {}
        for name, g in grads.items():
            sums[name] = (g.float() if g.dtype in (torch.bfloat16, torch.float16) else g).contiguous()
            self.reduced_bytes += sums[name].nbytes
        works = [dist.all_reduce(g, group=self.group, async_op=True) for g in sums.values()]

        def arrived() -> Params:
            for work in works:
                work.wait()
            return sums

        return arrived

    def agree(self, said: Mapping[str, object], device: torch.device) -> None:
        digests = [int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7]) for value in said.values()]
        both = torch.tensor([digests, [-d for d in digests]], device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        for (name, value), most, least in zip(said.items(), *both.tolist(), strict=True):
            if most != -least:
                raise UsageError(
                    f"process {self.rank} of {self.world}: {name} is not the same in all processes, here it is "
                    f"{str(value)[:80]}; start all of them with the same program, settings and torch"
                )


ALONE = Alone()
