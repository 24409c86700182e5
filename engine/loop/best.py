"""The best evaluation of a run so far, from the numbers that it recorded: so a resumed run knows it too."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LOSS = "eval/loss"


class Best(NamedTuple):
    step: int
    loss: float
    since: int
    """Evaluations after it, none of them better."""


def best(history: Sequence[Mapping[str, float]]) -> Best | None:
    """The evaluation with the lowest held-out loss, the first of equals; None where there is none."""
    points = [(int(record["step"]), record[LOSS]) for record in history if LOSS in record]
    finite = [(loss, i) for i, (_, loss) in enumerate(points) if not math.isnan(loss)]
    if not finite:
        return None
    loss, i = min(finite)
    return Best(points[i][0], loss, len(points) - 1 - i)


def kept(history: Sequence[Mapping[str, float]]) -> int | None:
    """The step whose checkpoint is the best one: step 0 has none."""
    found = best([record for record in history if record["step"] > 0])
    return found.step if found else None
