"""Tasks of an encoder, whole: they learn, their figures are those of the whole set, and a stopped run ends the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.glue import model, tasks
from helpers.runs import column, newest

from engine.config import RunConfig
from engine.data.glue import GLUE, files, read
from engine.data.pairs import Encoded, PairTokenizer
from engine.fit import fit
from engine.tasks.masked import MaskedTask
from engine.tasks.scores import scores
from engine.tasks.sequences import ClassificationTask, RegressionTask, RowTask
from models import encoder_weights
from models.segment import IGNORED
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

LENGTH = 20


def encoded(folder: Path, name: str) -> tuple[Encoded, Encoded]:
    tokenizer, found = PairTokenizer(folder / "model"), []
    for train in (True, False):
        own = read(files([str(folder / "glue")], GLUE[name], train), GLUE[name])
        kind = np.int64 if GLUE[name].labels else np.float32
        found.append(tokenizer.encode(own.texts, np.array(own.targets, kind), LENGTH))
    return found[0], found[1]


def task_of(folder: Path, name: str, **options: Any) -> Any:
    """A task with the tiny model that lies in `folder`."""
    train, held_out = encoded(folder, name if name != "masked" else "rte")
    head: Any = "masked" if name == "masked" else "classification" if GLUE[name].labels else "regression"
    net = encoder_weights.load(folder / "model", head, GLUE[name].labels if head == "classification" else ()).train()
    config = net.config.to_hf()
    if head == "masked":
        mask = PairTokenizer(folder / "model").mask
        return MaskedTask(net, train, held_out, LENGTH, mask=mask, config=config, **options)
    known: type[RowTask] = ClassificationTask if head == "classification" else RegressionTask
    figures = scores(["accuracy"] if GLUE[name].labels else [], len(GLUE[name].labels) or None)
    return known(net, train, held_out, LENGTH, scores=figures, config=config, **options)


def trained(task: Any, out: Path, **changed: Any) -> dict[str, float]:
    params = dict(task.model.named_parameters())
    optimizer = partition(params, [Group("adamw", adamw(), ("",), 3e-3)])
    usual = dict(out=out, steps=40, micro_batch=8, compile="off", eval_every=20, save_every=10, log_every=1, warmup=0)
    return fit(task, optimizer, RunConfig(**{**usual, "eval_first": True, "keep_last": 9, **changed})).metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("tasks")
    model(at / "model")
    return tasks(at / "glue").parent


@pytest.mark.run
@pytest.mark.parametrize("name", ["cola", "stsb", "masked"])
def test_a_task_is_learned_and_a_stopped_run_ends_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    """With dropout, and with masks that change from epoch to epoch."""
    found = trained(task_of(folder, name), tmp_path / "whole")
    curve = column(tmp_path / "whole", "eval/loss")
    assert curve[-1][1] < (0.97 if name == "masked" else 0.8) * curve[0][1], curve  # words are drawn evenly
    if name == "cola":
        assert found["accuracy"] > 0.7
    trained(task_of(folder, name), tmp_path / "parts", steps=40, resume="auto", patience=0)
    for step in ("step-00000040", "step-00000030"):
        for file in (tmp_path / "parts" / step).iterdir():
            file.unlink()
        (tmp_path / "parts" / step).rmdir()
    trained(task_of(folder, name), tmp_path / "parts", resume="auto")
    a, b = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert a.step == b.step == 40
    assert all(a.params[n].equal(b.params[n]) for n in a.params)


def test_an_evaluation_counts_every_row_once(folder: Path) -> None:
    task = task_of(folder, "cola")
    for size in (4, 11, 64):
        batches = list(task.evaluation(size))
        assert all(batch["targets"].shape == (size,) for batch in batches), "one static shape"
        targets = torch.cat([batch["targets"] for batch in batches])
        assert (targets != IGNORED).sum() == 11 and targets[
            targets != IGNORED
        ].tolist() == task.held_out.targets.tolist()
    assert len([t for batch in task_of(folder, "cola", most=5).evaluation(2) for t in batch["targets"] if t >= 0]) == 5


def test_a_mask_is_a_function_of_seed_epoch_and_row(folder: Path) -> None:
    task, twin = (task_of(folder, "masked", seed=seed) for seed in (0, 0))
    rows = task.rows
    whole = task.batch(0, 2 * rows)
    for first in (0, 7, rows - 3):  # batches may straddle epochs
        part = twin.batch(first, 8)
        for field in ("input_ids", "targets"):
            assert part[field].equal(whole[field][first : first + 8]), first
    hidden = whole["targets"] != IGNORED
    assert not torch.isin(whole["targets"], torch.tensor([0, 2, 3])).any(), "what the tokenizer added is never hidden"
    order = task._train.epochs
    first, again = (dict(zip(order.which(at, rows).tolist(), range(at, at + rows), strict=True)) for at in (0, rows))
    assert any(not hidden[first[k]].equal(hidden[again[k]]) for k in first), "anew in each epoch"
    share = hidden.sum() / (whole["attention_mask"].sum() - 3 * len(hidden))  # [CLS] and two [SEP] a row
    assert 0.10 < share < 0.20, share
    seen = whole["input_ids"][hidden]
    assert 0.7 < (seen == 4).float().mean() < 0.9
    kept = (seen == whole["targets"][hidden]).float().mean()
    assert 0.03 < kept < 0.25
    assert not task_of(folder, "masked", seed=1).batch(0, rows)["targets"].equal(whole["targets"][:rows])
    one, other = (torch.cat([b["targets"] for b in task.evaluation(4)]) for _ in range(2))
    assert one.equal(other)
