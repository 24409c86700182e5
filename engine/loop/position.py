"""The position in the data at which a resumed run continues. Settings decide which rows a position means; they may
differ."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import CheckpointError
from ..task import Task

ALIGN = "align"  # beside the task's own entries of a saved fingerprint


class Start(NamedTuple):
    """The position at which a run reads on, and what has to be said of it."""

    position: int
    said: str = ""


def saved_order(task: Task) -> dict[str, Any]:
    """What a checkpoint says of the order of the rows, as JSON gives it back."""
    order: dict[str, Any] = json.loads(json.dumps({**task.fingerprint(), ALIGN: task.align}))
    return order


def read_on(
    path: Path, task: Task, order: Mapping[str, Any], position: int, reorder: bool = False, swapped: bool = False
) -> Start:
    """Where `task` reads on after `position` rows in the `order` of the checkpoint at `path`, a `saved_order`.

    Raises CheckpointError where rows of the pass in hand would be read twice or never, unless `reorder` allows it: the
    run then begins a new pass, in its own order. Where only the alignment differs, the same rows stand at other
    positions. The run goes on with the rows that are left if they can be cut into whole steps, else it has to skip
    some; a run whose optimizer is `swapped` may, and says so.
    """
    mine = saved_order(task)
    odd = [name for name in {**mine, **order} if json.dumps(mine.get(name)) != json.dumps(order.get(name))]  # 1, True
    if not odd:
        return Start(position)
    align = order.get(ALIGN)
    if odd == [ALIGN] and type(align) is int and align > 0:
        there, skipped = _realigned(task, position, align)
        if not skipped:
            return Start(there)
        if reorder or swapped:
            return Start(
                there,
                f"{skipped} rows of this pass over the data are skipped, to end it in whole steps",
            )
        said = (
            f"a pass over the data now begins with a step of {task.align} rows, was {align}, and {skipped} of the rows "
            "that are left would be skipped"
        )
    else:
        said = "; ".join(f"--{name} {_short(order.get(name))}, got {_short(mine.get(name))}" for name in odd)
    if reorder:
        there = -(-position // task.epoch) * task.epoch
        return Start(there, f"a new pass over the data begins, in another order: trained with {said}")
    raise CheckpointError(
        f"{path}: was trained on other data or in another order, and rows would be read twice or never: trained with "
        f"{said}. Resume with the settings that it was trained with, or give --reorder to begin a new pass over the "
        "data in the new order"
    )


def read_ahead(batch: Callable[[int], int], done: int) -> list[int]:
    """The batches from `done` on that the first `done` steps have trained on, where an optimizer's `batch` takes a
    cycle in an order of its own: as many before `done` are left, and only the same `batch` knows which."""
    if all(batch(step) == step for step in range(max(done - 64, 0), done + 64)):
        return []
    return sorted(taken for step in range(done) if (taken := batch(step)) >= done)


def _realigned(task: Task, position: int, align: int) -> tuple[int, int]:
    """The position in the task's alignment of one in another, and how many rows lie between them."""
    epoch, place = divmod(position, -(-task.rows // align) * align)
    place = min(place, task.rows)  # blanks are no rows
    there = -(-place // task.align) * task.align
    return epoch * task.epoch + there, min(there, task.rows) - place


def _short(value: object) -> str:
    """A hash is known by its beginning."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
