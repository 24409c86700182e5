"""Weights from a Hugging Face folder: what was written, never twice in memory; and what does not fit is one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES, config_of, wide
from helpers.grids import few
from safetensors.torch import load_file, save_file

from engine.memory import counted_peak
from models import weights
from models.config import DecoderConfig
from models.decoder import Decoder

SMALL = config_of("llama")


def written(folder: Path, model: Decoder, largest: int = 2**40, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    weights.save(folder, model.config.to_hf(), shapes, dtype, params.__getitem__, largest)
    return folder


def assert_same(got: Decoder, expected: Decoder) -> None:
    named = dict(expected.named_parameters())
    assert list(named) == [n for n, _ in got.named_parameters()] and got.config == expected.config
    for name, p in got.named_parameters():
        assert p.dtype == named[name].dtype and p.equal(named[name]), name


@pytest.mark.parametrize("name", few(FAMILIES, "llama, scaled", "qwen3, sliding", "smollm3"))
def test_written_and_read_is_bitwise_the_same(tmp_path: Path, name: str) -> None:
    model = wide(config_of(name))
    for largest in (2**40, 10_000):
        folder = written(tmp_path / str(largest), model, largest)
        assert (folder / weights.INDEX).is_file() == (largest == 10_000)
        assert_same(weights.load(folder), model)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_is_the_files_or_the_one_asked_for(tmp_path: Path, kept: torch.dtype) -> None:
    model = wide(SMALL)
    folder = written(tmp_path, model, 20_000, kept)
    assert_same(weights.load(folder), wide(SMALL).to(kept))
    assert_same(weights.load(folder, torch.float32), wide(SMALL).to(kept).float())


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """The library reads what we write, and we read what it writes, in whatever order its tensors are."""
    model = wide(replace(SMALL, tie_word_embeddings=True))
    folder = written(tmp_path, model)
    content = load_file(folder / weights.SINGLE)
    assert all(content[name].equal(p) for name, p in model.state_dict().items()) and len(content) == 38
    save_file(dict(reversed(content.items())), folder / weights.SINGLE)
    assert_same(weights.load(folder), model)


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    model = wide(SMALL)
    folder = written(tmp_path, model, 10_000)
    index = json.loads((folder / weights.INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    for file in files:
        content = load_file(file)
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= 10_000
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        (torch.float32, torch.bfloat16),
        *(pytest.param(kept, torch.float32, marks=pytest.mark.slow) for kept in (torch.float32, torch.bfloat16)),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_there_is_never_a_second_copy(tmp_path: Path, kept: torch.dtype, asked: torch.dtype) -> None:
    """Not even of the largest tensor, which is most of this model."""
    config = replace(SMALL, vocab_size=120_000, hidden_size=64, tie_word_embeddings=True)
    folder = written(tmp_path, Decoder(config), 2**20, kept)
    size = Decoder(config).num_parameters() * asked.itemsize
    peak = counted_peak(lambda: weights.load(folder, asked))
    slices = weights.shards.SLICE if kept != asked else 0
    assert size <= peak <= 1.01 * size + slices


def test_a_tied_output_matrix_may_be_stored_too_where_it_is_the_same(tmp_path: Path) -> None:
    model = wide(replace(SMALL, tie_word_embeddings=True))
    folder = written(tmp_path, model)
    content = load_file(folder / weights.SINGLE)
    twice = {**content, weights.OUTPUT: content[weights.EMBEDDINGS[0]].clone()}
    save_file(twice, folder / weights.SINGLE)
    assert_same(weights.load(folder), model)
    twice[weights.OUTPUT][3, 3] += 1
    save_file(twice, folder / weights.SINGLE)
    with pytest.raises(
        ValueError, match="lm_head.weight: got other numbers than model.embed_tokens.weight, .* set tie"
    ):
        weights.load(folder)


def changed(folder: Path, **change: Any) -> None:
    config = json.loads((folder / weights.CONFIG).read_text())
    (folder / weights.CONFIG).write_text(json.dumps({**config, **change}))


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00021.safetensors").unlink()


def cut(folder: Path, to: int) -> None:
    file = folder / "model-00001-of-00021.safetensors"
    file.write_bytes(file.read_bytes()[:to])


def spoil(folder: Path) -> None:
    file = folder / "model-00001-of-00021.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[97,32]", b"[97,31]").replace(b"[97, 32]", b"[97, 31]"))


def only_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()


def outside(folder: Path) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))


BAD: dict[str, tuple[Any, str]] = {
    "missing shard": (
        drop_shard,
        r"model-00002-of-00021.safetensors: is not there, expected one of 21 files that .*, with model.* fetch it",
    ),
    "cut off": (lambda f: cut(f, -100), r"model-00001-of-00021.safetensors: is cut off: got \d+ bytes, expected \d+"),
    "cut in its head": (lambda f: cut(f, 50), r"00001-of-00021.safetensors: is cut off: got 50 bytes, expected \d+"),
    "empty": (lambda f: cut(f, 0), r"00001-of-00021.safetensors: got 0 bytes that are no safetensors file"),
    "damaged head": (spoil, r"its head is damaged \(model.embed_tokens.weight has bytes 0 to 12416 and"),
    "wrong shape": (
        lambda f: changed(f, intermediate_size=50),
        r"model.layers.0.mlp.gate_proj.weight: got the shape \[48, 32\], expected \[50, 32\] by config.json; give",
    ),
    "a layer too few": (
        lambda f: changed(f, num_hidden_layers=3),
        r"layers.3.self_attn.q_proj.weight: got a tensor \(and 8 more\) that the model of config.json does not have",
    ),
    "a layer too many": (
        lambda f: changed(f, num_hidden_layers=5),
        r"layers.4.self_attn.q_proj.weight: got no such tensor \(nor 8 more\), expected \[32, 32\] by config.json;",
    ),
    "untied": (lambda f: changed(f, tie_word_embeddings=False), r"lm_head.weight: got no such tensor, .*; set tie_"),
    "another family": (
        lambda f: changed(f, model_type="mamba"),
        r"model_type: got 'mamba', expected a language model, one of llama, .*, gpt2",
    ),
    "an unknown key": (lambda f: changed(f, logit_scale=0.5), r"config.json: logit_scale: got 0.5, which no llama"),
    "pickle": (only_pickle, r"got only pytorch_model.bin, a pickle; expected model.safetensors or"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: is not there; give a folder"),
    "no JSON": (lambda f: (f / weights.INDEX).write_text("{"), r"index.json: is not JSON"),
    "a file elsewhere": (outside, r"index.json: weight_map: got the file '../b.safetensors', expected one beside it"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path, wide(replace(SMALL, tie_word_embeddings=True)), 10_000)
    assert (folder / "model-00021-of-00021.safetensors").is_file()
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        weights.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_dtype_that_is_not_read(tmp_path: Path) -> None:
    folder = written(tmp_path, wide(SMALL))
    content = load_file(folder / weights.SINGLE)
    content["model.norm.weight"] = content["model.norm.weight"].to(torch.int8)
    save_file(content, folder / weights.SINGLE)
    with pytest.raises(ValueError, match="model.norm.weight: got the dtype I8, expected one of F64, F32, F16, BF16;"):
        weights.load(folder)


def test_old_tables_of_angles_are_no_weights(tmp_path: Path) -> None:
    model = wide(SMALL)
    folder = written(tmp_path, model)
    content = load_file(folder / weights.SINGLE)
    save_file({**content, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / weights.SINGLE)
    assert_same(weights.load(folder), model)


def test_a_tokenizer_may_have_fewer_tokens_and_not_more() -> None:
    config = DecoderConfig(100, 32, 48, 2, 4)
    weights.check_vocabulary(97, config, "t", Path("model"))
    with pytest.raises(
        ValueError, match="tokenizer t: got a vocabulary of 101, expected at most 100, that of the model"
    ):
        weights.check_vocabulary(101, config, "t", Path("model"))
