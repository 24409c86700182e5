"""A fine-tuned encoder as Hugging Face publishes it: transformers says the same of its rows as the checkpoint does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.glue import folder
from helpers.runs import here, refused, tool

from engine.data.pairs import PairTokenizer
from models import encoder_weights
from models.encoder import Encoder

SMALL = "--compile off --no-check-memory --sequence 20 --micro-batch 4 --steps 2 --init model --data glue"


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch)
    return found if isinstance(model, Encoder) else found.logits


@pytest.mark.run
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_is_exported_is_the_model_that_was_trained(tmp_path: Path, kind: str) -> None:
    folder(tmp_path, kind)
    recipe = "rso glue --period 1" if kind == "bert" else "omgd glue --active 1"  # P and B, and masks, leave nothing
    done = here(tmp_path, f"{recipe} --task rte {SMALL} --lr 1e-2 --out run")
    assert done.code == 0, done
    done = tool(tmp_path, "tools.export run out")
    assert done.code == 0, done
    assert "tokenizer.json" in done.out and "model.safetensors" in done.out
    out = tmp_path / "out"
    ours = encoder_weights.load(out)
    assert ours.config.labels == ("entailment", "not_entailment")
    saved = encoder_weights.load(tmp_path / "run/step-00000002")
    assert all(map(torch.equal, ours.parameters(), saved.parameters()))
    first = encoder_weights.load(tmp_path / "model", "classification", ours.config.labels)
    name = f"{kind}.encoder.layer.0.attention.self.query.weight"
    moved = [n for n, p in ours.named_parameters() if not p.equal(dict(first.named_parameters())[n])]
    assert kind == "roberta" or name in moved
    again = tool(tmp_path, "tools.export out again --dtype bf16")
    assert again.code == 0, again
    assert "bfloat16" in again.out
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    encoded = PairTokenizer(out).encode([("the cat", "a dog not"), ("a bird sings",)], torch.zeros(2).numpy(), 20)
    pad = ours.config.pad_token_id
    batch = {k: torch.from_numpy(v) for k, v in encoded.rows([0, 1], 20, pad).items()}
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_a_model_without_a_head_is_not_exported(tmp_path: Path) -> None:
    folder(tmp_path)
    body = encoder_weights.load(tmp_path / "model", "classification", ("a", "b"))
    encoder_weights.save(tmp_path / "model", body, architectures=["BertModel"])
    assert "got no such tensor, expected the head" in refused(tool(tmp_path, "tools.export model out"), 2)
    assert not (tmp_path / "out").exists()
