"""The memory of a step on packed conversations is predicted from their shapes alone."""

import gc

import pytest
import torch
from helpers.plans import TINY, built, settings

from engine.memory import counted_peak
from engine.planner.plan import plan
from engine.step.step import Step
from engine.tasks.conversations import blank


@pytest.mark.run
def test_packed_rows_are_planned() -> None:
    config = settings(8, 32, compile="off")
    gc.collect()
    found = plan(
        lambda: built("adamw", TINY, torch.float32, False)._replace(batch=lambda rows: blank(rows, 32)),
        config,
        steps=(1,),
    )
    segments, params, optimizer, *_ = built("adamw", TINY, torch.float32)
    state = optimizer.init(params)
    step = Step(segments, params, optimizer, state, mode="off")
    batch = blank(8, 32)
    batch["supervised"] = torch.arange(32).repeat(8, 1)
    hypers = {g.name: {k: torch.tensor(1e-3) for k in ("lr", "weight_decay")} for g in optimizer.owner.values()}
    for i in (0, 1):
        step([batch], hypers, i)
    tables = {id(b): b for s in segments for b in s.module.buffers()}.values()
    slots = [t for own in state.values() for t in own.values()]
    fixed = sum(t.numel() * t.element_size() for t in (*params.values(), *tables, *slots, *batch.values()))
    assert found.bytes == pytest.approx(fixed + counted_peak(lambda: step([batch], hypers, 1)), rel=0.02)
