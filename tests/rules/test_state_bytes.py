"""The state of every rule is as large as its paper says, in floats of an m x n matrix."""

from collections.abc import Callable

import pytest
import torch

from optimizers.contract import Kind, state_bytes
from optimizers.registry import RULES
from tests.support import RANK, small


def basis(m: int, n: int, momentum: int = 1) -> int:
    """A basis of the shorter side and `momentum` tensors of coordinates."""
    return RANK * min(m, n) + momentum * RANK * max(m, n)


FLOATS: dict[str, Callable[[int, int], int]] = {  # scalars apart
    "adamw": lambda m, n: 2 * m * n,
    "sgd": lambda m, n: m * n,
    "muon": lambda m, n: m * n,
    "scale": lambda m, n: 0,
    "scale head": lambda m, n: m * n,
    "galore": lambda m, n: basis(m, n, 2),
    "adam_sn": lambda m, n: m * n + max(m, n),
    "adagrad_sn": lambda m, n: m * n + max(m, n),
    "rmsprop_sn": lambda m, n: max(m, n),
    "adam_snsm": lambda m, n: basis(m, n) + max(m, n),
    "adagrad_snsm": lambda m, n: basis(m, n) + max(m, n),
    "sgd_sm": lambda m, n: basis(m, n),
    "adam_sm": lambda m, n: basis(m, n) + m * n,
    "snsm": lambda m, n: basis(m, n) + max(m, n),
    "snsm topk": lambda m, n: 2 * RANK + RANK * min(m, n) + max(m, n),
    "sumo": lambda m, n: basis(m, n),
    "sumo track": lambda m, n: basis(m, n),
    "sumo_paper": lambda m, n: basis(m, n),
    "sumo_release": lambda m, n: basis(m, n),
}
OPTIONS = {
    "scale head": dict(momentum=0.9),
    "snsm topk": dict(proj_type="topk"),
    "sumo track": dict(basis="track", side="longer"),
}


@pytest.mark.parametrize("case", FLOATS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_state_holds_what_the_formula_says(case, shape):
    rule = small(RULES[case.split()[0]], **OPTIONS.get(case, {}))
    slots = rule.init(torch.empty(shape, device="meta", dtype=torch.bfloat16))
    scalars = {name: slots[name] for name in rule.names(Kind.COUNTER)}
    assert state_bytes(slots) - state_bytes(scalars) == 4 * FLOATS[case](*shape)
