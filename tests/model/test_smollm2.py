"""A published model, whole: SmolLM2-135M-Instruct, with its real weights.

LEANSTEP_SMOLLM2 names a folder with its config.json, tokenizer.json and model.safetensors; without it these skip, as
those that compare with transformers do without it.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engine.data.chat.asking import asking
from engine.data.chat.template import load_template
from engine.data.tokenizer import load_tokenizer
from engine.memory import counted_peak
from models import weights
from models.sampling import answers, generate
from tools.export import Export, export
from tools.generate import main

FOLDER = Path(os.environ.get("LEANSTEP_SMOLLM2", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("LEANSTEP_SMOLLM2"), reason="LEANSTEP_SMOLLM2 names no folder with SmolLM2-135M-Instruct"
)
TEXT = "Gravity pulls things towards each other. The Moon goes round the Earth, and the Earth goes round the Sun.\n"


def theirs() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_logits_and_gradients_are_those_of_transformers() -> None:
    expected, ours = theirs(), weights.load(FOLDER, torch.float32)
    ids = torch.tensor([load_tokenizer(str(FOLDER)).encode(TEXT * 3)])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), expected(ids).logits, atol=1e-4, rtol=1e-5)
    ids = ids[:, :24]
    for logits in (ours(ids), expected(ids).logits):
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    named = dict(expected.named_parameters())
    for name, p in ours.named_parameters():
        assert (p.grad - named[name].grad).norm() <= 1e-4 * named[name].grad.norm(), name


def test_it_knows_the_capital_of_france(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "The capital of France is", "--temperature", "0", "--max-new-tokens", "3"]
    assert main([str(FOLDER), *flags]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_starting_takes_no_second_copy(dtype: torch.dtype) -> None:
    held = weights.load(FOLDER, dtype).num_parameters() * dtype.itemsize
    assert held < counted_peak(lambda: weights.load(FOLDER, dtype)) <= 1.05 * held


def test_transformers_says_the_same_of_what_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    export(Export(FOLDER, tmp_path / "out", shard_size="100MB"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template == (FOLDER / "chat_template.jinja").read_text()
    given = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.float().generate(**given, max_new_tokens=12, do_sample=False)[0])
    capsys.readouterr()
    ours = weights.load(tmp_path / "out", torch.float32)
    ids = load_tokenizer(str(tmp_path / "out")).encode("The capital of France is")
    new = generate(ours, ids, 12, temperature=0)
    assert said == tokenizer.decode([*ids, *new])
    original = weights.load(FOLDER)
    assert all(p.equal(q.float()) for p, q in zip(ours.parameters(), original.parameters(), strict=True))


def test_questions_answered_together_get_the_text_that_transformers_gives_alone() -> None:
    expected, ours, tokenizer = theirs(), weights.load(FOLDER, torch.float32), load_tokenizer(str(FOLDER))
    template = load_template(FOLDER)
    questions = (
        "What is the capital of Italy?",
        "Anna has 3 apples and buys 4 more, then she eats 2 of them. How many apples does she have?",
        "Say yes.",
    )
    asked = [asking(tokenizer, template, [{"role": "user", "content": text}], "a test") for text in questions]
    found = answers(ours, asked, 24, (tokenizer.eos,))
    for ids, new in zip(asked, found, strict=True):
        said = expected.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
        assert tokenizer.decode(new) == tokenizer.decode([i for i in said if i != tokenizer.eos])
