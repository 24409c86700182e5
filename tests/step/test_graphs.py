"""How often a step compiles: once a kind of segment, whatever the depth, the schedule and the bases."""

import pytest
import torch
from helpers.models import LR, VOCABULARY, batches, graphs, llama, rate
from helpers.steps import hypers, make
from torch._dynamo.utils import counters

from engine.step.segments import cut
from engine.step.step import Step
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd


def compiled_graphs(step: Step, steps: int) -> list[int]:
    """Graphs compiled so far, after each step."""
    torch._dynamo.reset()
    counters.clear()
    numbers, rates = [], hypers(0)
    for i in range(steps):
        rates["all"]["lr"].fill_(rate(i))
        step(batches(i), rates, i)
        numbers.append(graphs())
    return numbers


@pytest.mark.compiles
def test_blocks_share_their_graphs_and_a_schedule_never_recompiles(traced):
    shallow = compiled_graphs(make(llama(4), mode="segments", clip="previous"), 50)
    deep = compiled_graphs(make(llama(16), mode="segments", clip="previous"), 3)
    assert shallow[-1] == deep[-1] == 6, "forward of embedding, block and head, and an update of each"
    assert shallow[0] == shallow[-1], "all of them on the first step"


@pytest.mark.compiles
def test_refreshed_bases_never_recompile(traced):
    model = llama(1)
    params = dict(model.named_parameters())
    groups = [
        Group("all", galore(rank=4, update_proj_gap=7), ("_proj",), LR),
        Group("rest", sgd(0.0), ("",), LR),
    ]
    optimizer = partition(params, groups)
    assert len({optimizer.due(i) for i in range(1, 8)}) > 2, "refreshes are spread over the steps"
    state = optimizer.init(params)
    step = Step(cut(model), params, optimizer, state, logits=VOCABULARY * 8)
    start = {name: slots["basis"].clone() for name, slots in state.items() if "basis" in slots}
    torch._dynamo.reset()
    counters.clear()
    numbers, refreshed, rates = [], 0, hypers(0)
    rates["rest"] = rates["all"]
    for i in range(23):
        rates["all"]["lr"].fill_(rate(i))
        result = step(batches(i), rates, i)
        assert all(result.refreshed)
        assert len(result.refreshed) == len(optimizer.due(i))
        refreshed += len(result.refreshed)
        numbers.append(graphs())
    assert numbers[1] == numbers[-1] <= 6, numbers
    assert refreshed > 3 * len(start)
    assert not any(basis.equal(state[name]["basis"]) for name, basis in start.items())
