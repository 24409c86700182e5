"""Talking to a model by its template, and answers in a batch."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.finetuning import folder
from helpers.grids import few
from helpers.runs import tool

from engine.data.chat.show import written
from engine.data.chat.template import load_template
from engine.data.tokenizer import load_tokenizer
from models import weights
from models.sampling import answers, generate
from tools.chat import converse, template_of


def test_an_answer_is_what_the_template_asks_for(tmp_path: Path) -> None:
    model = weights.load(folder(tmp_path) / "model")
    tokenizer, template = load_tokenizer(str(tmp_path / "model")), load_template(tmp_path / "model")
    assert template is not None and tokenizer.spans is not None
    said = [{"role": "system", "content": "Be."}, {"role": "user", "content": "4 and 4"}]
    ids = tokenizer.spans([template.render(said, add_generation_prompt=True)])[0].ids.tolist()
    expected = tokenizer.decode(list(generate(model, ids, 5, 0.0, eos=tokenizer.eos)))
    line = "tools.generate model --chat --system Be. --prompt '4 and 4' --max-new-tokens 5"
    done = tool(tmp_path, f"{line} --temperature 0")
    assert (done.code, done.out) == (0, expected + "\n"), done
    settings = {"do_sample": False, "eos_token_id": [ids[0], tokenizer.eos]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    assert tool(tmp_path, line).out == expected.partition("<|im_start|>")[0] + "\n"


def test_a_conversation_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = folder(tmp_path) / "model"
    tokenizer, asked = load_tokenizer(str(at)), list[str]()

    def answer(ids: list[int]) -> Iterator[int]:
        asked.append(written(tokenizer, ids))
        return iter(tokenizer.encode("four"))

    monkeypatch.setattr("sys.stdin", io.StringIO("how many\n\nand then\n"))
    converse(tokenizer, template_of(at), "", "", answer, lambda new: iter([tokenizer.decode(list(new))]))
    assert len(asked) == 2 and asked[1].startswith(asked[0] + "four<|im_end|>\n<|im_start|>user\nand then<|im_end|>")


def test_what_chat_refuses(tmp_path: Path) -> None:
    folder(tmp_path)
    done = tool(tmp_path, "tools.generate model --system x")
    assert done.code == 2 and "--system: says something with --chat only" in done.err
    (tmp_path / "model/chat_template.jinja").unlink()
    done = tool(tmp_path, "tools.generate model --chat --prompt a")
    assert done.code == 2 and "has no chat template" in done.err


@pytest.mark.parametrize("family", few(["qwen3", "mistral, sliding", "smollm3"], "mistral, sliding"))
def test_answers_together_are_those_alone(tmp_path: Path, family: str) -> None:
    model = weights.load(folder(tmp_path, family) / "model")
    prompts = [[5, 9, 17], [200, 3, 3, 8, 41, 7, 250], [11, 12, 13, 14], list(range(100, 162))]
    alone = [list(generate(model, prompt, 9, 0.0, eos=(40, 41))) for prompt in prompts]
    assert answers(model, prompts, 9, (40, 41)) == alone
    assert len(alone[3]) <= 3  # the model's last position
