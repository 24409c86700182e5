"""A function in several processes at once, a gloo group of torch.distributed."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(minutes=10)  # the machine may be busy


def together(world: int, folder: Path, function: Callable[..., Any], *given: object) -> list[Any]:
    """What `function(*given)`, of a module, returns in each of `world` processes: tensors and plain values. An error in
    one is raised here."""
    mp.spawn(_one, (world, str(folder), function, given), nprocs=world)
    return [torch.load(folder / f"answer-{rank}") for rank in range(world)]


def _one(rank: int, world: int, folder: str, function: Callable[..., Any], given: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", timeout=PATIENCE, rank=rank, world_size=world)
    try:
        torch.save(function(*given), f"{folder}/answer-{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
