"""Generation: filters give the distribution they say, the cache changes nothing, the command says what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT

from engine.checkpoint import save
from engine.data.tokenizer import load_tokenizer
from models import weights
from models.llama import PRESETS, Llama, LlamaConfig
from models.sampling import generate, probabilities
from tools.generate import load_model, main, text, tokenizer_of

TINY = LlamaConfig(257, 32, 40, 2, 4, 2, max_position_embeddings=48)


def peaked(config=TINY, seed=0):
    """An untrained model with clear preferences, so that rounding decides no argmax."""
    return Llama(replace(config, initializer_range=0.3), seed)


def write_run(root, steps=(1000,), config=TINY, tokenizer="byte", dtype=torch.float32):
    for step in steps:
        model = peaked(config, seed=step).to(dtype)
        params = {name: p.detach() for name, p in model.named_parameters()}
        save(root, step, params, {}, {"config": {"tokenizer": tokenizer}}, model.config.to_hf())
    return root


def call(capsys, *args):
    """Run the command; returns (exit code, stdout, stderr)."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:  # tyro's own errors
        code = stop.code
    return code, *capsys.readouterr()


def random_logits(n=50, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2


def softmax(x):
    e = np.exp(x.numpy().astype(np.float64) - x.max().item())
    return e / e.sum()


def test_no_filter_is_softmax():
    x = random_logits()
    np.testing.assert_allclose(probabilities(x), softmax(x), rtol=1e-5)
    np.testing.assert_allclose(probabilities(x, temperature=0.5), softmax(x / 0.5), rtol=1e-5)
    assert probabilities(random_logits(32000)).count_nonzero() == 32000, "top_p 1 drops nothing to rounding"


@pytest.mark.parametrize("k", [1, 3, 50, 80])
def test_top_k(k):
    x = random_logits()
    p = softmax(x)
    p[np.argsort(-p)[k:]] = 0
    np.testing.assert_allclose(probabilities(x, top_k=k), p / p.sum(), rtol=1e-5)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p(top_p):
    x = random_logits()
    p = softmax(x)
    order = np.argsort(-p)
    kept = 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))  # the fewest that hold at least top_p
    p[order[kept:]] = 0
    np.testing.assert_allclose(probabilities(x, top_p=top_p), p / p.sum(), rtol=1e-5)


def test_top_p_counts_what_top_k_left():
    x = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    expected = torch.tensor([4 / 7, 3 / 7, 0, 0])
    torch.testing.assert_close(probabilities(x, top_k=3, top_p=0.7), expected)
    torch.testing.assert_close(probabilities(x, top_k=2, top_p=0.5), torch.tensor([1.0, 0, 0, 0]))


def test_ties_and_extremes():
    assert probabilities(torch.zeros(8), top_k=3).count_nonzero() == 3
    assert probabilities(torch.tensor([1.0, 5.0, 5.0]), temperature=0).tolist() == [0, 1, 0]
    assert probabilities(torch.tensor([1.0, 5.0, 3.0]), temperature=1e-40).tolist() == [0, 1, 0]


def test_input_is_not_changed():
    x = random_logits()
    before = x.clone()
    for temperature in (0, 1.0):
        probabilities(x, temperature=temperature, top_k=3, top_p=0.5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_with_cache_equals_without(tied):
    model = peaked(replace(TINY, tie_word_embeddings=tied))
    ids = [1, 2, 3, 4]
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, ids[:4], 20, temperature=0)) == ids[4:]


def test_seed_decides():
    model = peaked(replace(TINY, max_position_embeddings=64))
    a, b, c = (list(generate(model, [7], 30, temperature=1.0, seed=s)) for s in (1, 1, 2))
    assert a == b != c
    state = torch.get_rng_state()
    list(generate(model, [7], 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_probabilities():
    model = Llama(replace(TINY, vocab_size=4, initializer_range=0.5))
    with torch.no_grad():
        p = probabilities(model(torch.tensor([[1]]))[0, -1], temperature=0.7, top_k=3)
    draws = [next(generate(model, [1], 1, temperature=0.7, top_k=3, seed=s)) for s in range(300)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 300
    assert (shares - p).abs().max() < 0.1  # 3.4 standard deviations of the widest
    assert set(draws) <= set(p.nonzero().flatten().tolist())


def test_eos_stops_and_is_not_yielded():
    model = peaked()
    free = list(generate(model, [5], 12, temperature=0))
    stop = free[4]
    assert list(generate(model, [5], 12, temperature=0, eos=stop)) == free[: free.index(stop)]


def test_the_last_position_is_used_and_no_more():
    model = peaked()
    assert len(list(generate(model, [1] * 48, 100))) == 1
    assert len(list(generate(model, [1] * 40, 100))) == 9
    with pytest.raises(ValueError, match="prompt: got 49 tokens, expected 1 to max_position_embeddings = 48"):
        generate(model, [1] * 49, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": []}, "prompt: got 0 tokens, .* give at least one"),
        ({"ids": [3, 300]}, "prompt: got token 300, expected 0 to 256"),
        ({"ids": [-1]}, "prompt: got token -1, expected 0 to 256"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: got -1.0, expected a finite number"),
        ({"temperature": float("nan")}, "temperature: got nan, expected a finite number"),
        ({"top_k": -1}, "top_k: got -1, expected at least 0"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected above 0"),
        ({"top_p": 1.5}, "top_p: got 1.5, expected above 0 and at most 1"),
    ],
)
def test_wrong_arguments_are_named_before_the_first_token(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(peaked(), **{"ids": [1], "max_new_tokens": 1, **arguments})


def test_broken_weights_are_named():
    model = peaked()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="logits: got nan"):
        list(generate(model, [1], 1, temperature=0))


def test_generating_leaves_training_alone():
    model = Llama(PRESETS["demo"])
    list(generate(model, [1], 2))
    ids = torch.randint(257, (1, 8))
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("split", range(16))
def test_text_holds_back_unfinished_characters(split):
    """Whatever stands in the prompt and whatever is new, pieces never show half a character, and nothing is lost."""
    tokenizer = load_tokenizer("byte")
    whole = "aé€😀 b\u0301!"
    ids = tokenizer.encode(whole)
    pieces = list(text(ids[:split], ids[split:], tokenizer.decode))
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_shows_invalid_bytes_once():
    tokenizer = load_tokenizer("byte")
    ids = [0x61, 0xE2, 0x82, 0x62, 0xFF, 0xC3]
    assert "".join(text(ids[:2], ids[2:], tokenizer.decode)) == bytes(ids).decode(errors="replace")


def test_command_newest_named_and_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=(1000, 2000))
    options = ("--prompt", "ab", "--max-new-tokens", 8, "--temperature", 0, "--device", "cpu")
    newest = call(capsys, run, *options)
    assert newest[0] == 0 and newest[1].startswith("ab") and newest[2] == ""
    assert call(capsys, run / "step-00002000", *options) == newest
    assert call(capsys, run, "--checkpoint", 2000, *options) == newest
    assert call(capsys, run, "--checkpoint", 1000, *options)[1] != newest[1]
    tokenizer, model = load_tokenizer("byte"), peaked(seed=2000)
    ids = tokenizer.encode("ab")
    ids += generate(model, ids, 8, temperature=0, eos=tokenizer.eos)
    assert newest[1] == tokenizer.decode(ids) + "\n"


def test_command_seed_and_empty_prompt(tmp_path, capsys):
    run = write_run(tmp_path)
    a, b, c = (call(capsys, run, "--max-new-tokens", 20, "--seed", s, "--device", "cpu") for s in (1, 1, 2))
    assert a[0] == 0 and a == b != c


def test_command_steps_over_a_damaged_checkpoint(tmp_path, capsys):
    run = write_run(tmp_path, steps=(1000, 2000))
    weights = run / "step-00002000" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 8)
    code, out, err = call(capsys, run, "--prompt", "x", "--max-new-tokens", 2, "--device", "cpu")
    assert code == 0 and out.startswith("x") and "skipped step-00002000" in err
    code, out, err = call(capsys, run, "--checkpoint", 2000, "--device", "cpu")
    assert (code, out) == (5, "") and err.startswith("error:") and err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_load_model_is_exact(tmp_path, dtype, tied):
    config = replace(TINY, tie_word_embeddings=tied)
    write_run(tmp_path, config=config, dtype=dtype)
    got, expected = load_model(tmp_path / "step-00001000", torch.device("cpu")), peaked(config, seed=1000).to(dtype)
    ids = torch.randint(257, (1, 9))
    assert got(ids).dtype == dtype and torch.equal(got(ids), expected(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{run}x",), "error: RUN: got"),
        (("{run}", "--checkpoint", "7"), "error: --checkpoint: got 7, expected one of the steps in {run}: 1000"),
        (("{run}", "--prompt", "a" * 49), "error: prompt: got 49 tokens, expected 1 to max_position_embeddings = 48"),
        (("{run}", "--top-p", "0"), "error: top_p: got 0.0"),
        (("{run}", "--max-new-tokens", "0"), "error: max_new_tokens: got 0"),
        (("{run}", "--tokenizer", "nowhere.json"), "error: tokenizer 'nowhere.json'"),
        (("{run}", "--device", "abacus"), "error: --device: got 'abacus'"),
        (("{run}", "--nonsense"), ""),
        (("{run}", "--temperature", "warm"), ""),
        ((), ""),
    ],
)
def test_command_errors(tmp_path, capsys, arguments, message):
    run = write_run(tmp_path)
    code, out, err = call(capsys, *(a.format(run=run) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith(message.format(run=run))
    if message:
        assert err.count("\n") == 1


def test_command_names_a_missing_tokenizer(tmp_path, capsys):
    run = write_run(tmp_path, tokenizer=None)
    code, _, err = call(capsys, run)
    assert code == 5 and "config.tokenizer: got None" in err and "--tokenizer" in err
    assert call(capsys, run, "--tokenizer", "byte", "--max-new-tokens", 1, "--device", "cpu")[0] == 0


def test_the_end_token_of_the_run_is_used(tmp_path, capsys):
    """From the run's own copy of the tokenizer, and from its config where that copy is gone."""
    vocabulary = {chr(97 + i): i for i in range(26)} | {"</s>": 26, "<eos>": 27}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    spec = str(tmp_path / "vocab.json")
    write_run(tmp_path / "run", tokenizer=spec)
    head = tmp_path / "run/step-00001000/trainer.json"
    content = json.loads(head.read_text())
    content["config"]["eos"] = "<eos>"
    head.write_text(json.dumps(content))
    assert tokenizer_of(head.parent).eos == 27 and load_tokenizer(spec).eos == 26
    (tmp_path / "run/tokenizer").mkdir()
    load_tokenizer(spec, "a").copy_to(tmp_path / "run/tokenizer")
    assert tokenizer_of(head.parent).eos == 0
    for flags in (("--tokenizer", spec, "--eos", "<gone>"), ("--eos", "</s>")):
        code, _, err = call(capsys, head.parent, *flags)
        assert code == 2 and err.startswith("error: --eos: ")


def test_command_names_an_unusable_config(tmp_path, capsys):
    write_run(tmp_path)
    file = tmp_path / "step-00001000" / "config.json"
    file.write_text(json.dumps(TINY.to_hf() | {"hidden_act": "gelu"}))
    code, _, err = call(capsys, file.parent)
    assert code == 5 and "hidden_act: got 'gelu', expected 'silu'" in err


@pytest.mark.run
def test_as_a_module(tmp_path: Path):
    """The text survives a terminal that cannot show it, and reaches the pipe whole."""
    run = write_run(tmp_path)
    options = ["--prompt", "h\u00e9", "--max-new-tokens", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "tools.generate", str(run), *options]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"h?") and done.stdout.endswith(b"\n")


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--form products", "--form products --share", "--precision bf16-sr --form products"])
def test_what_hugging_face_opens_is_the_model_that_was_trained(tmp_path, flags):
    """model.safetensors, read by itself, has the loss that the run reported; W without B Pᵀ has another."""
    import json

    from helpers.runs import TINY, corpus, here
    from safetensors.torch import load_file

    from engine.checkpoint import read

    run = f"rso demo {TINY} --lr 1e-2 --rank 4 --period 7 {flags} --steps 17 --warmup 0 --schedule constant --out run"
    assert here(corpus(tmp_path), run).code == 0
    folder = tmp_path / "run" / "step-00000017"
    opened = load_file(folder / "model.safetensors")
    reader = read(folder)
    name = next(n for n in opened if n.endswith("q_proj.weight"))
    slots = reader.slots(name)
    w = reader.trained(name)
    expected = (w.float() + slots["B"].float() @ slots["P"].float().T).to(w.dtype)
    assert torch.equal(opened[name], expected) and not torch.equal(opened[name], w)
    model = load_model(folder, torch.device("cpu"))
    assert torch.equal(dict(model.named_parameters())[name], opened[name])
    assert json.loads((folder / "trainer.json").read_text())["schema"] == 2


def test_command_on_a_published_model(tmp_path, capsys):
    """A folder without a run: one file or several, and the tokens that its tokenizer puts first."""
    folder = published_model(tmp_path / "whole")
    code, out, err = call(capsys, folder, "--prompt", "abc", "--temperature", 0, "--max-new-tokens", 6)
    model, ids = load_model(folder, torch.device("cpu")), [256, *b"abc"]
    expected = load_tokenizer("byte").decode([*ids, *generate(model, ids, 6, temperature=0)])
    assert (code, out, err) == (0, expected + "\n", "")
    sharded = published_model(tmp_path / "sharded", 10_000)
    assert call(capsys, sharded, "--prompt", "abc", "--temperature", 0, "--max-new-tokens", 6) == (0, out, "")
    second = sorted(sharded.glob("model-*"))[1]
    second.unlink()
    code, out, err = call(capsys, sharded)
    assert code == 2 and err.startswith("error: ") and f"{second.name}: is not there" in err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, capsys):
    folder = published_model(tmp_path, config=replace(TINY, vocab_size=200))
    code, _, err = call(capsys, folder)
    assert code == 2 and "got a vocabulary of 257, expected at most 200, that of the model in" in err


def published_model(folder, largest=2**40, config=TINY):
    """A model as Hugging Face publishes it, with a tokenizer of bytes that begins every text with an end mark."""
    folder.mkdir(exist_ok=True)
    params = dict(peaked(config).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    weights.save(folder, config.to_hf(), shapes, torch.float32, params.__getitem__, largest)
    alphabet = bytes_to_unicode()
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: b for b, c in alphabet.items()} | {"</s>": 256}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["</s>"])
    core.post_processor = tokenizers.processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 256)])
    core.save(str(folder / "tokenizer.json"))
    return folder


def bytes_to_unicode():
    """The character that GPT-2 writes for each byte: its own where it is printed, else the next one from U+0100."""
    own = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    others = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}
