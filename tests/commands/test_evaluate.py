"""What a model can do, counted."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from helpers.finetuning import folder, write
from helpers.runs import refused, tool

from engine.data.chat.show import written
from engine.data.tokenizer import load_tokenizer
from tools.evaluate import number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4\n#### 1,234", "1234"),
        ("#### $-5.50 and 7", "-5.5"),
        ("first 3, then 12.", "12"),
        ("####", None),
        ("2 ####", "2"),
    ],
)
def test_the_number_of_an_answer(text: str, number: str | None) -> None:
    assert number_of(text) == (None if number is None else Decimal(number))


def test_questions_are_counted_whatever_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers with the number of characters of the question, to questions of many lengths."""
    tokenizer = load_tokenizer(str(folder(tmp_path) / "model"))
    sizes, width = [9, 2, 7, 4, 5], list[int]()

    def answered(model: object, prompts: list[list[int]], most: int, ends: tuple[int, ...]) -> list[list[int]]:
        width.append(len(prompts))
        said = [written(tokenizer, ids).split("user\n")[1].partition("<|im_end|>")[0] for ids in prompts]
        assert tokenizer.eos in ends and all(text == "x" * len(text) for text in said)
        return [tokenizer.encode(f"it is {len(text)}")[:most] for text in said]

    monkeypatch.setattr("models.sampling.answers", answered)
    rows = [{"question": "x" * n, "answer": f"count\n#### {n if n != 7 else 8}"} for n in sizes]
    write(tmp_path / "q.jsonl", rows)
    line = "tools.evaluate model --task gsm8k --data q.jsonl --batch 2"
    done = tool(tmp_path, line)
    assert done.code == 0 and "exact match 4 of 5, 80.0%" in done.out, done
    assert width == [2, 2, 1]
    assert "exact match 2 of 2," in tool(tmp_path, f"{line} --limit 2").out
    problem = {"sQuestion": "xxx", "lEquations": ["X=1+2"], "lSolutions": [3.0]}
    write(tmp_path / "m.jsonl", [problem, problem | {"sQuestion": "xx"}])
    assert "exact match 1 of 2, 50.0%" in tool(tmp_path, line.replace("q.jsonl", "m.jsonl")).out
    write(tmp_path / "m.jsonl", [problem | {"lSolutions": []}])
    assert "m.jsonl, line 1: lSolutions: got []" in refused(tool(tmp_path, line.replace("q.jsonl", "m.jsonl")), 2)


def test_perplexity_is_that_of_the_windows(tmp_path: Path) -> None:
    folder(tmp_path)
    done = tool(tmp_path, "tools.evaluate model --task perplexity --data general.txt --sequence 32 --batch 5")
    assert done.code == 0, done
    again = tool(tmp_path, "tools.evaluate model --task perplexity --data general.txt --sequence 32 --batch 2")
    assert done.out == again.out and done.out.startswith("perplexity: ")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "a", "answer": "none"}) + "\n")
    line = refused(tool(tmp_path, "tools.evaluate model --task gsm8k --data bad.jsonl"), 2)
    assert "bad.jsonl, line 1" in line and "an answer with a number" in line
    assert "--limit: got 0" in refused(tool(tmp_path, "tools.evaluate model --task gsm8k --data q --limit 0"), 2)
