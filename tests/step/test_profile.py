"""--profile: a trace that names the step, its segments and its updates."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.config import RunConfig
from engine.fit import fit
from engine.loop.profile import FILE
from engine.tasks.arrays import ArrayTask
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.rules.sgd import sgd
from recipes.registry import parsed


def trained(out: Path, capsys: pytest.CaptureFixture[str], **options: int) -> str:
    model = nn.Linear(2, 1)
    data = {"x": torch.ones(4, 2)}

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return module(batch["x"]).square().sum(), len(batch["x"])

    task = ArrayTask(model, loss, train=data, validation=data)
    optimizer = partition(dict(model.named_parameters()), [Group("all", sgd(0.0), ("",), 0.1)])
    fit(task, optimizer, RunConfig(out=out, compile="off", device="cpu", micro_batch=2, **options))
    return capsys.readouterr().out


@pytest.mark.run
def test_the_trace_has_the_steps_that_were_asked_for(tmp_path, capsys):
    said = trained(tmp_path / "a", capsys, steps=6, profile=2)
    events = [e.get("name") for e in json.loads((tmp_path / "a" / FILE).read_text())["traceEvents"]]
    assert "step 2" in events and "step 3" in events and not {"step 1", "step 4"} & {*events}
    assert {"head", "forward of model", "backward of model", "update"} <= {*events}
    assert f"profile      {tmp_path / 'a' / FILE}, 2 steps" in said


@pytest.mark.run
def test_a_run_that_is_too_short_says_so_and_one_that_is_not_asked_writes_none(tmp_path, capsys):
    assert "profile      none: the first 2 steps" in trained(tmp_path / "a", capsys, steps=2, profile=1)
    assert "1 steps" in trained(tmp_path / "b", capsys, steps=3, profile=9), "as many as there were"
    assert "profile" not in trained(tmp_path / "c", capsys, steps=3)
    assert [(tmp_path / run / FILE).exists() for run in "abc"] == [False, True, False]


def test_a_number_is_not_taken_for_a_rule_of_sumos():
    assert parsed(["sumo", "demo", "--profile", "3"], "test").profile == 3
    assert parsed(["sumo", "demo", "--profile=paper"], "test").profile == 0
    with pytest.raises(UsageError, match="--profile: got 'three', expected one of recommended, paper, release"):
        parsed(["sumo", "demo", "--profile", "three"], "test")


def test_fewer_than_none_are_refused():
    with pytest.raises(UsageError, match="--profile must be at least 0, got -1"):
        RunConfig(profile=-1).check()
