"""--init: a run begins with a published model's weights and tokenizer, and what goes out and in again is the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import config_of, wide
from helpers.grids import covering, few
from helpers.runs import assert_identical, corpus, here, refused, tool

from engine.data.tokenizer import train_bpe
from engine.memory import counted_peak
from models import weights
from models.decoder import Decoder
from recipes.build import build
from recipes.registry import parsed

SHORT = (
    "--compile off --no-check-memory --data corpus.txt --sequence 16 --micro-batch 2 --steps 6 "
    "--warmup 0 --schedule constant --eval-windows 4 --log-every 1 "
)


def published(folder: Path, name: str = "qwen3", dtype: torch.dtype = torch.float32) -> Decoder:
    """A model in `folder`, with a tokenizer, a chat template and settings of generation; returns it."""
    folder.mkdir(parents=True)
    model = wide(replace(config_of(name), vocab_size=300))
    params = dict(model.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    weights.save(folder, model.config.to_hf(), shapes, dtype, params.__getitem__, 20_000)
    (folder / "tokenizer.json").write_text(train_bpe(["the step of a loss and its basis"] * 20, 270))
    said = {"eos_token": "<|endoftext|>", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    return model


@pytest.mark.parametrize(
    ("name", "recipe"),
    covering(
        ["llama, scaled", "mistral, sliding", "qwen2", "qwen3", "smollm3"],
        ["baseline", "rso demo --rank 4", "omgd pretrain"],
    ),
)
def test_a_run_begins_with_the_published_weights(tmp_path: Path, name: str, recipe: str) -> None:
    model = published(tmp_path / "model", name)
    config = parsed([*recipe.split(), *SHORT.split(), "--init", str(tmp_path / "model")], "test")
    run = build(config, 270)
    params = run.place("cpu")
    named = dict(model.named_parameters())
    assert run.model.config == model.config and list(params) == list(named)
    assert all(p.equal(named[n]) for n, p in params.items())


def test_a_run_of_such_a_model_goes_out_and_in_again(tmp_path: Path) -> None:
    """Trained, exported, and begun with: the same bits; its tokenizer's template and settings go along."""
    corpus(tmp_path)
    published(tmp_path / "model")
    done = here(tmp_path, f"snsm demo {SHORT} --rank 4 --init model --out run")
    assert done.code == 0, done
    assert "vocabulary 270" in done.out
    done = tool(tmp_path, "tools.export run out --shard-size 10kB")
    assert done.code == 0, done
    got = dict(weights.load(tmp_path / "out").named_parameters())
    before = dict(weights.load(tmp_path / "model").named_parameters())
    assert not any(p.equal(before[n]) for n, p in got.items())
    again = build(parsed(["baseline", *SHORT.split(), "--init", str(tmp_path / "out")], "test"), 270).place("cpu")
    assert all(p.equal(got[n]) for n, p in again.items())
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["padding_side"] == "left"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.6
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.run
def test_such_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    corpus(tmp_path)
    published(tmp_path / "model", "smollm3, sliding")
    line = f"baseline {SHORT} --save-every 3 --eval-every 3 --init model"
    for flags in ("--out whole", "--out parts --steps 3", "--out parts --resume auto"):
        done = here(tmp_path, f"{line} {flags}")
        assert done.code == 0, done
    assert_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("dtype", few(["fp32", "bf16"], "bf16"))
def test_beginning_takes_no_second_copy(tmp_path: Path, dtype: str) -> None:
    """Not even of the embedding, which is most of this model; tables of angles count."""
    model = Decoder(replace(config_of("llama"), vocab_size=200_000, hidden_size=64, tie_word_embeddings=True))
    params = dict(model.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    (tmp_path / "model").mkdir()
    weights.save(tmp_path / "model", model.config.to_hf(), shapes, torch.float32, params.__getitem__, 2**20)
    (tmp_path / "model/tokenizer.json").write_text(train_bpe(["a"], 257))
    line = ["baseline", *SHORT.split(), "--init", str(tmp_path / "model"), "--precision", dtype]
    run = build(parsed(line, "test"), 257)
    held = model.num_parameters() * (4 if dtype == "fp32" else 2)
    slices = 0 if dtype == "fp32" else weights.shards.SLICE
    assert held <= counted_peak(lambda: run.place("cpu")) <= 1.01 * held + slices


def test_what_is_refused(tmp_path: Path) -> None:
    corpus(tmp_path)
    published(tmp_path / "model")

    def said(flags: str) -> str:
        return refused(here(tmp_path, f"baseline {SHORT} {flags}"), 2)

    assert "--model: --init gives the model with its sizes" in said("--init model --model 60m")
    assert "--size.hidden-size: --init gives the model" in said("--init model --size.hidden-size 64")
    assert "--sequence: got 65, expected at most 64, the positions of the model in" in said(
        "--init model --sequence 65"
    )
    assert "--init: " in (line := said("--init nowhere")) and "nowhere/config.json: is not there" in line
    (tmp_path / "other.json").write_text(train_bpe([str(i) * 3 for i in range(2000)], 400))
    assert "expected at most 300, that of the model in model; give" in said("--init model --tokenizer other.json")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    line = said("--init model")
    assert (
        "--init: " in line and "mlp.gate_proj.weight: got the shape [48, 32], expected [50, 32] by config.json" in line
    )
    first = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    first.unlink()
    assert f"{first.name}: is not there, expected one of" in said("--init model")
