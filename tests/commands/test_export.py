"""What tools.export writes is what was trained, to us to the bit and to transformers; what cannot be written is a line.

Tests with transformers skip without it.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from helpers.families import FAMILIES, config_of, wide
from helpers.grids import few
from helpers.runs import TINY, corpus, here, refused, tool
from safetensors.torch import load_file

from engine.checkpoint import save
from engine.data.tokenizer import load_tokenizer, train_bpe
from models import weights
from models.llama import Llama, LlamaConfig
from models.sampling import generate
from tools.generate import tokenizer_of

SHAPE = LlamaConfig(300, 32, 40, 2, 4, 2, max_position_embeddings=64, initializer_range=0.3)
TEXTS = ["def f(x):\n    return x", "  two  spaces\tand a tab", "héé €😀\x00\x7f", "the loss of a step"]


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")


def trained(root: Path, tokenizer: str = "byte", config: LlamaConfig = SHAPE, seed: int = 0) -> Llama:
    """A checkpoint of step 3 in root/run; returns its model."""
    model = Llama(config, seed)
    params = {name: p.detach() for name, p in model.named_parameters()}
    save(root / "run", 3, params, {}, {"config": {"tokenizer": tokenizer}}, config.to_hf())
    return model.eval()


def exported(root: Path, flags: str = "") -> Path:
    done = tool(root, f"tools.export run out {flags}")
    assert (done.code, done.err) == (0, ""), done
    assert not [p.name for p in root.iterdir() if p.name.startswith(".")], "nothing hidden is left"
    for name in (p.name for p in (root / "out").iterdir()):
        assert name in done.out
    return root / "out"


@pytest.mark.parametrize("flags", ["", "--shard-size 20kB"])
def test_export_and_read_is_bitwise_what_was_saved(tmp_path: Path, flags: str) -> None:
    model = trained(tmp_path)
    out = exported(tmp_path, flags)
    got = weights.load(out)
    assert got.config == model.config.from_hf(model.config.to_hf())
    assert all(p.equal(q) for p, q in zip(got.parameters(), model.parameters(), strict=True))
    assert len(list(out.glob("*.safetensors"))) == (5 if flags else 1)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_dtype(tmp_path: Path, name: str) -> None:
    model, dtype = trained(tmp_path), {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    out = exported(tmp_path, f"--dtype {name}")
    content = load_file(out / "model.safetensors")
    assert all(content[n].equal(p.to(dtype)) and content[n].dtype == dtype for n, p in model.named_parameters())
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_tied_matrix_is_written_once(tmp_path: Path) -> None:
    model = trained(tmp_path, config=replace(SHAPE, tie_word_embeddings=True))
    content = load_file(exported(tmp_path) / "model.safetensors")
    assert "lm_head.weight" not in content and content["model.embed_tokens.weight"].equal(
        model.model.embed_tokens.weight
    )


def spec(root: Path, kind: str) -> str:
    """A tokenizer of this form, as --tokenizer takes it."""
    if kind == "byte":
        return kind
    core = tokenizers.Tokenizer.from_str(train_bpe(TEXTS * 30, 290))
    if kind == "tokenizer.json":
        core.save(str(root / kind))
    elif kind == "vocab.json":
        core.model.save(str(root))
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "loss", "of", "a", "step", "d", "##e", "##f"]
        (root / kind).write_text("\n".join(words))
    return str(root / kind)


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json", "vocab.json", "vocab.txt"])
def test_the_tokenizer_is_the_one_that_was_trained_with(tmp_path: Path, kind: str) -> None:
    trained(tmp_path, spec(tmp_path, kind))
    out = exported(tmp_path)
    ours = load_tokenizer(spec(tmp_path, kind))
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    again = load_tokenizer(str(out))
    assert again.eos == ours.eos and again.vocab_size == ours.vocab_size
    for text in TEXTS if kind != "vocab.txt" else TEXTS[-1:]:
        ids = ours.encode(text)
        assert ids and theirs.encode(text, add_special_tokens=False).ids == ids == again.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == ours.eos
    end = theirs.id_to_token(ours.eos)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((out / name).read_text())["eos_token"] == end


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json"])
@pytest.mark.parametrize("flags", ["", "--shard-size 20kB"])
def test_transformers_loads_it_and_says_the_same(tmp_path: Path, kind: str, flags: str) -> None:
    library = transformers()
    model = trained(tmp_path, spec(tmp_path, kind))
    out = exported(tmp_path, flags)
    theirs, ours = library.AutoModelForCausalLM.from_pretrained(out), tokenizer_of(tmp_path / "run/step-00000003")
    tokenizer = library.AutoTokenizer.from_pretrained(out)
    assert theirs.dtype == torch.float32 and tokenizer.eos_token_id == ours.eos == theirs.generation_config.eos_token_id
    ids = ours.encode("def f(x):")
    given = tokenizer("def f(x):", return_tensors="pt")
    assert given["input_ids"].tolist() == [ids]
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([ids])), theirs(**given).logits, atol=1e-4, rtol=0)
    said = theirs.generate(**given, max_new_tokens=20, do_sample=False)[0, len(ids) :].tolist()
    expected = list(generate(model, ids, 20, temperature=0, eos=ours.eos))
    assert expected and said[: len(expected)] == expected
    assert tokenizer.decode([*ids, *said], skip_special_tokens=True) == ours.decode([*ids, *expected])


@pytest.mark.parametrize("name", few(FAMILIES, "llama, scaled", "qwen3, sliding", "smollm3"))
def test_every_family_goes_out_and_comes_back(tmp_path: Path, name: str) -> None:
    model = wide(replace(config_of(name), vocab_size=257))
    params = dict(model.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    (tmp_path / "run").mkdir()
    weights.save(tmp_path / "run", model.config.to_hf(), shapes, torch.float32, params.__getitem__, 2**40)
    out = exported(tmp_path, "--tokenizer byte")
    got = weights.load(out)
    assert got.config == model.config and all(p.equal(params[n]) for n, p in got.named_parameters())
    theirs = transformers().AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    ids = torch.arange(40)[None] * 6
    with torch.no_grad():
        torch.testing.assert_close(got(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.run
def test_what_rso_keeps_in_two_parts_is_merged(tmp_path: Path) -> None:
    run = f"rso demo {TINY} --lr 1e-2 --rank 4 --period 7 --form products --steps 17 --warmup 0 --out run"
    assert here(corpus(tmp_path), run).code == 0
    done = tool(tmp_path, "tools.export run out")
    assert done.code == 0, done
    content = load_file(tmp_path / "run/step-00000017/model.safetensors")
    apart = load_file(tmp_path / "run/step-00000017/weights.safetensors")
    assert any(not content[name].equal(t) for name, t in apart.items() if name in content)
    got = dict(weights.load(tmp_path / "out").named_parameters())
    assert got.keys() == content.keys() and all(got[name].equal(t) for name, t in content.items())


def test_what_lies_beside_a_published_tokenizer_goes_along(tmp_path: Path) -> None:
    """Chat template, other special tokens, settings of generation; and a run's copy of the tokenizer is as good."""
    folder = tmp_path / "run"
    trained(tmp_path, "byte")
    kept = folder / "tokenizer"
    kept.mkdir()
    spec(kept, "tokenizer.json")
    (kept / "chat_template.jinja").write_text("{{ messages }}")
    (kept / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "!", "pad_token": "?", "padding_side": "left"})
    )
    (kept / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "#"}, "eos_token": "!"}))
    (kept / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [1, 2]}))
    out = exported(tmp_path)
    read = {file.name: json.loads(file.read_text()) for file in out.glob("*.json")}
    vocabulary = read["tokenizer.json"]["model"]["vocab"]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read["tokenizer_config.json"]["padding_side"] == "left" and read["tokenizer_config.json"]["eos_token"] == "!"
    assert read["special_tokens_map.json"] == {"bos_token": {"content": "#"}, "eos_token": "!", "pad_token": "?"}
    assert read["generation_config.json"]["temperature"] == 0.6
    assert read["generation_config.json"]["eos_token_id"] == [1, 2]
    assert [read["config.json"][f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [vocabulary[c] for c in "#!?"]


def fails(root: Path, line: str, code: int = 2) -> str:
    before = sorted(p.name for p in root.iterdir())
    said = refused(tool(root, f"tools.export {line}"), code)
    assert sorted(p.name for p in root.iterdir()) == before, "nothing is left behind"
    return said


def test_what_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    (tmp_path / "file").touch()
    assert "OUT taken: holds files already; name another folder" in fails(tmp_path, "run taken")
    assert "OUT file: is there already and no folder" in fails(tmp_path, "run file")
    assert "--shard-size: got 'much', expected a size above 0" in fails(tmp_path, "run out --shard-size much")
    assert "--checkpoint: got 4, expected one of the steps in run: 3" in fails(tmp_path, "run out --checkpoint 4")
    assert "RUN: got 'nowhere'" in fails(tmp_path, "nowhere out")
    assert "tokenizer 'no.json'" in fails(tmp_path, "run out --tokenizer no.json")
    assert "--dtype" in fails(tmp_path, "run out --dtype int8")
    os.truncate(tmp_path / "run/step-00000003/model.safetensors", 5000)
    assert "cut off: got 5000 bytes" in fails(tmp_path, "run/step-00000003 out", 5)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, config=replace(SHAPE, vocab_size=200))
    assert "tokenizer byte: got a vocabulary of 257, expected at most 200" in fails(tmp_path, "run out")


def test_a_folder_that_takes_nothing_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.shards, "write", full)
    assert "error: out: No space left on device" in fails(tmp_path, "run out", 1)


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "out").mkdir()
    assert (exported(tmp_path) / "model.safetensors").is_file()
