"""State of SNSM in bytes, for the models of the paper."""

from collections import Counter
from functools import cache

import pytest
import torch

from optimizers.clock import clock
from optimizers.contract import Rule, state_bytes
from optimizers.rules.snsm import (
    adagrad_snsm,
    adam_sm,
    adam_sn,
    adam_snsm,
    rmsprop_sn,
    sgd_sm,
    snsm,
)

DENSE = ("auto", "svd", "range", "random")


# bytes --------------------------------------------------------------------------------------------------------------


MODELS = {  # hidden, intermediate, layers; vocabulary 32000, untied, no biases
    "60M": (512, 1376, 8),
    "130M": (768, 2048, 12),
    "350M": (1024, 2736, 24),
    "1B": (2048, 5461, 24),
    "3B": (2560, 6848, 32),
    "7B": (4096, 11008, 32),
}
RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}
GIB = {  # of bf16, as the specification prints or computes them
    "adam_sn": dict(zip(MODELS, (0.139, 0.296, 0.747, 2.618, 5.158, 12.799), strict=True)),
    "rmsprop_sn": dict(zip(MODELS, (0.031, 0.046, 0.062, 0.123, 0.155, 0.248), strict=True)),
    "svd": dict(zip(RANKS, (0.088, 0.191, 0.361, 1.169, 5.327), strict=True)),
    "topk": dict(zip(RANKS, (0.068, 0.123, 0.205, 0.576, 2.250), strict=True)),
}


@cache
def inventory(model: str) -> tuple[list[tuple[int, int]], int]:
    """(shapes of the Linear weights, elements of everything else)."""
    d, f, layers = MODELS[model]
    block = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]
    return block * layers + [(32000, d)], 32000 * d + (2 * layers + 1) * d


def held(rule: Rule, model: str) -> int:
    """State bytes of the Linear weights under `rule`, without the scalars of `clock`."""
    total = 0
    for shape, count in Counter(inventory(model)[0]).items():
        p = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        slots = rule.init(p)
        assert all(s.device.type == "meta" for s in slots.values())
        total += count * (state_bytes(slots) - state_bytes(clock(p)))
    return total


@pytest.mark.parametrize("model", MODELS)
def test_state_bytes_equal_the_formulas(model):
    linear, rest = inventory(model)
    elements = sum(m * n for m, n in linear)
    longer, shorter = sum(max(s) for s in linear), sum(min(s) for s in linear)
    counts = {"adam_sn": (held(adam_sn(), model), elements + longer, rest)}
    counts["rmsprop_sn"] = held(rmsprop_sn(), model), longer, 0
    for name in ("adam_sn", "rmsprop_sn"):
        got, formula, other = counts[name]
        assert got == 4 * formula
        assert abs(2 * (formula + other + rest) / 2**30 - GIB[name][model]) < 6e-4
    if model in RANKS:
        r, count = RANKS[model], len(linear)
        both = r * (longer + shorter)
        for kind in DENSE:
            assert held(snsm(r, proj_type=kind), model) == 4 * (both + longer)
        for kind in ("topk", "uniform"):
            assert held(snsm(r, proj_type=kind), model) == 4 * (r * shorter + longer) + 8 * r * count
        assert held(snsm(r, proj_type="srht"), model) == 4 * (r + 1) * longer + 8 * r * count + shorter
        assert held(adam_sm(r), model) == 4 * (both + elements)
        assert held(sgd_sm(r), model) == 4 * both
        assert held(adagrad_snsm(r), model) == held(adam_snsm(r), model) == 4 * (both + longer)
        assert abs(2 * (both + longer + 2 * rest) / 2**30 - GIB["svd"][model]) < 6e-4
        assert abs(2 * (r * shorter + longer + 2 * rest) / 2**30 - GIB["topk"][model]) < 6e-4
    assert held(adam_sn(subset=-2), model) == pytest.approx(held(adam_sn(), model), rel=1e-3)
