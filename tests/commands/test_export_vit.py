"""A trained ViT as Hugging Face publishes it: transformers says the same of its images as the checkpoint does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import here, refused, tool
from helpers.vision import idx

from engine.data.images.augment import normalized
from models import vit_weights

LINE = (
    "baseline vit --data set --compile off --no-check-memory --micro-batch 16 --padding 1 --steps 2 --lr 1e-2 "
    "--body.hidden-size 16 --body.num-hidden-layers 2 --body.num-attention-heads 2"
)


@pytest.mark.run
@pytest.mark.parametrize("norm", ["half", "imagenet"])
def test_what_is_exported_is_the_model_that_was_trained(tmp_path: Path, norm: str) -> None:
    """Under its classes' names, and with what transformers has to know to read an image as the run did."""
    idx(tmp_path / "set", 48, 12)
    assert here(tmp_path, f"{LINE} --norm {norm} --precision bf16 --out run").code == 0
    done = tool(tmp_path, "tools.export run out --dtype fp32")
    assert done.code == 0, done
    assert "preprocessor_config.json" in done.out and "model.safetensors" in done.out
    ours, saved = (vit_weights.load(tmp_path / folder) for folder in ("out", "run/step-00000002"))
    assert ours.config == saved.config and ours.config.labels == ("0", "1", "2")
    assert all(map(torch.equal, ours.parameters(), saved.parameters()))
    told = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    plain = (pixels.numpy() * told["rescale_factor"] - told["image_mean"][0]) / told["image_std"][0]
    np.testing.assert_allclose(normalized(pixels, norm).numpy(), plain, atol=1e-6)
    assert told["size"] == {"height": 8, "width": 8}
    again = tool(tmp_path, "tools.export out again --dtype bf16")
    assert again.code == 0 and "bfloat16" in again.out, again
    assert json.loads((tmp_path / "again/preprocessor_config.json").read_text()) == told
    assert "--tokenizer" in refused(tool(tmp_path, "tools.export run other --tokenizer run"), 2)
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = theirs(normalized(pixels, norm)).logits
        torch.testing.assert_close(ours(normalized(pixels, norm)), logits, atol=1e-5, rtol=0)
    assert theirs.config.id2label == {0: "0", 1: "1", 2: "2"}


@pytest.mark.run
def test_a_resnet_is_no_model_of_hugging_face(tmp_path: Path) -> None:
    idx(tmp_path / "set", 48, 12)
    line = "baseline resnet --data set --compile off --no-check-memory --micro-batch 16 --steps 2 --out run"
    assert here(tmp_path, line).code == 0
    line = refused(tool(tmp_path, "tools.export run out"), 2)
    assert "ResNet" in line and not (tmp_path / "out").exists()
