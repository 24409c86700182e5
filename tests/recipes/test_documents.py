"""`--documents apart` reaches the model: another loss than joined, and what a document alone has."""

import json
from pathlib import Path

import pytest
import torch

from engine.data import Batches
from models.packed import documents_of
from recipes.baseline import Baseline
from recipes.build import build
from recipes.config import Size
from recipes.plan import planned
from recipes.train import train


@pytest.mark.run
def test_documents_apart_are_trained_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"{k} is a short document, {'very ' * (k % 3)}short"}) for k in range(90)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines[20:]))
    (tmp_path / "v.jsonl").write_text("\n".join(lines[:20]))
    size = Size(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    losses = {}
    for documents in ("joined", "apart"):
        config = Baseline(
            data=("t.jsonl",),
            validation=("v.jsonl",),
            documents=documents,
            sequence=64,
            steps=3,
            micro_batch=2,
            compile="off",
            size=size,
        )
        out = train(config)
        losses[documents] = json.loads((out / "result.json").read_text())["eval/loss"]
        assert planned(config).bytes > 0
    assert losses["joined"] != losses["apart"]


@torch.no_grad()
def test_a_window_of_documents_has_the_logits_of_each_alone(tmp_path: Path) -> None:
    model = build(Baseline(), 257).model
    model.allocate("cpu")
    model.init_weights(0)

    class Text:
        eos, vocab_size = 256, 257

        def windows(self, seq: int) -> int:
            return 1

        def window(self, k: int, seq: int):
            ids = torch.tensor([*b"one", 256, *b"another text", 256, *b"end"] + [0] * seq).numpy()
            return ids[:seq], ids[1 : seq + 1]

    batch = Batches(Text(), 20, apart=True).batch(0, 1)  # type: ignore[arg-type]
    ids = batch["input_ids"]
    packed = model(ids, documents=documents_of(batch))[0]
    for here in (slice(0, 3), slice(3, 16), slice(16, 20)):
        torch.testing.assert_close(packed[here], model(ids[:, here])[0], atol=1e-5, rtol=1e-5)
