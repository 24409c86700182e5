"""Training on conversations: what a run reads, what it reports, and that packing changes neither."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chats import checkpoint, turns
from helpers.models import llama

from engine.config import RunConfig
from engine.data.chat.prepare import prepare
from engine.data.chat.reader import Examples
from engine.data.chat.request import ChatRequest
from engine.fit import fit
from engine.step.segments import Chain
from engine.task import add
from engine.tasks.conversations import ConversationTask, blank
from models.llama import Llama
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

SEQUENCE = 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chats = [{"messages": turns(f"how many are {k}?", f"{k} " * (1 + k % 4), system="s")} for k in range(24)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, chats)))
    request = ChatRequest(data=(str(tmp_path / "t.jsonl"),), validation_fraction=0.3)
    model = checkpoint(tmp_path / "model")
    return prepare(tmp_path / "data", ChatRequest(**{**vars(request), "tokenizer": str(model)}))


def task(folder: Path, model: Llama | None = None, **options: Any) -> ConversationTask:
    model = model or llama(vocab_size=320, max_position_embeddings=SEQUENCE)
    examples, held_out = Examples(folder), Examples(folder, "validation")
    return ConversationTask(model, examples, held_out, SEQUENCE, config=model.config.to_hf(), **options)


def evaluated(task: ConversationTask) -> tuple[float, float]:
    """The sum of the held-out loss, and of how many tokens."""
    chain, params, sums = Chain(task.segments()), dict(task.model.named_parameters()), {}
    for batch in task.evaluation(3):
        add(sums, task.evaluate(chain, params, batch))
    return sums["loss"][0].item(), sums["loss"][1].item()


def test_packing_changes_no_loss(folder: Path) -> None:
    packed, alone = task(folder), task(folder, pack=False)
    assert len(packed.held_out.rows) < len(alone.held_out.rows) == len(Examples(folder, "validation"))
    (loss, count), (other, other_count) = evaluated(packed), evaluated(alone)
    assert count == other_count == Examples(folder, "validation").trained.sum()
    assert loss == pytest.approx(other, rel=1e-6)


@pytest.mark.run
def test_a_run_learns_the_answers_and_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    def run(out: str, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        model = llama(vocab_size=320, max_position_embeddings=SEQUENCE)
        optimizer = partition(dict(model.named_parameters()), [Group("adamw", adamw(), ("",), lr=1e-2)])
        fixed = {"micro_batch": 2, "accumulation": 2, "compile": "off", "schedule": "constant", "warmup": 2}
        done = fit(task(folder, model), optimizer, RunConfig(out=tmp_path / out, **fixed, **settings))
        return {name: p.detach().clone() for name, p in model.named_parameters()}, done.metrics

    params, metrics = run("whole", steps=20)
    assert metrics["loss"] < 4 and metrics.keys() == {"loss", "perplexity"}, "5.8 to begin with"
    run("parts", steps=9)
    resumed, _ = run("parts", steps=20, resume="auto")
    assert all(torch.equal(p, resumed[name]) for name, p in params.items())


def test_what_decides_the_rows(folder: Path) -> None:
    one = task(folder)
    assert one.fingerprint() == task(folder).fingerprint()
    for options in ({"seed": 1}, {"pack": False}, {"longer": "cut"}):
        assert task(folder, **options).fingerprint() != one.fingerprint(), options
    assert one.rows == len(one.train.rows) and one.units(3) == 3 * SEQUENCE
    assert [line.split(":")[0] for line in one.in_words()] == ["format", "train", "held out"]


def test_a_plan_needs_the_shapes_only(folder: Path) -> None:
    batch, planned = task(folder).batch(0, 2), blank(2, SEQUENCE)
    assert batch.keys() == planned.keys()
    for name, values in batch.items():
        assert values.dtype == planned[name].dtype and (values.shape == planned[name].shape or name == "supervised")


def test_a_model_that_does_not_fit(folder: Path) -> None:
    with pytest.raises(UsageError, match="vocabulary: got a model of 97 tokens, expected the tokenizer's 301"):
        task(folder, llama(max_position_embeddings=SEQUENCE))
    with pytest.raises(UsageError, match="--sequence: got 96, expected at most max_position_embeddings = 64"):
        task(folder, llama(vocab_size=320, max_position_embeddings=64))
