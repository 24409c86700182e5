"""`tools.prepare` on conversations: what it prints, and one line with exit code 2 for what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chats import checkpoint, turns
from rich.console import Console

from engine.data import tokenizer_of
from engine.data.chat.reader import Examples
from engine.data.chat.show import marked, show
from tools.prepare import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def rows(path: Path, *given: Any) -> str:
    path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    return str(path)


CHATS = [{"messages": turns(f"how many, {k}?", f"{k} it is")} for k in range(8)]


def test_what_is_printed(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path / "t.jsonl", *CHATS)
    asked = [str(tmp_path / "out"), "--data", data, "--tokenizer", str(model)]
    assert main([*asked, "--show", "2", "--sequence", "200"]) == 0
    out = capsys.readouterr().out
    assert "the rows are conversations by their keys: --chat" in out
    assert "format: messages; put into the checkpoint's chat template; trained: assistant" in out
    assert out.count("of them trained (in ⟦⟧)") == 2 and "t.jsonl, line 1: " in out
    assert "user\nhow many, 0?<|im_end|>\n<|im_start|>assistant\n⟦0 it is<|im_end|>⟧\n" in out
    assert "train: 7 examples in " in out and "validation: 1 example in 1 row of 200 tokens; " in out
    assert "held out: 1 of 8 examples" in out and "tokens trained" in out
    assert main([*asked, "--chat"]) == 0
    assert "format: messages" in capsys.readouterr().out, "a folder that is there says what it holds"


def test_colour_where_there_is_some(tmp_path: Path, model: Path) -> None:
    assert main([str(tmp_path / "out"), "--data", rows(tmp_path / "t.jsonl", *CHATS), "--tokenizer", str(model)]) == 0
    examples, tokenizer = Examples(tmp_path / "out"), tokenizer_of(tmp_path / "out")
    with (tmp_path / "shown").open("w+", encoding="utf-8") as file:
        show(Console(file=file, force_terminal=True, color_system="truecolor"), tokenizer, examples, 0, limit=40)
        file.seek(0)
        said = file.read()
    assert "\x1b[" in said and "⟦" not in said and "tokens more" in said
    ids, trained = examples.read(0)
    styles = {str(span.style) for span in marked(tokenizer, ids.tolist(), trained.tolist(), True).spans}
    assert styles == {"bold green", "dim"}


LONG = {"messages": turns("a", "b" * 100_000)}
LATE = {"messages": turns("a" * 100_000, "b")}


@pytest.mark.parametrize(
    ("given", "flags", "expected"),
    [
        (
            [LONG],
            ("--sequence", "512"),
            "1 example of 7 longer than the sequence of 512 tokens; the longest, t",
        ),
        ([LATE], ("--sequence", "512", "--longer", "cut"), "cut to 512 tokens, of which none is trained"),
        ([{"messages": turns("a", "")}], (), "t.jsonl, line 9: message 2 (assistant) is empty"),
        ([], ("--tokenizer", "byte"), "messages needs a chat template, and the tokenizer 'byte' has none"),
        ([], ("--longer", "cut"), "--longer cut: says what becomes of what is longer than --sequence"),
    ],
)
def test_one_line_and_exit_code_2(
    given: list[Any],
    flags: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*CHATS, *given]
    validation = rows(tmp_path / "v.jsonl", *CHATS[:2])
    data = ["--data", rows(tmp_path / "t.jsonl", *given), "--validation", validation]
    assert main([str(tmp_path / "out"), *data, "--tokenizer", str(model), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err


@pytest.mark.parametrize("flags", [("--show", "1"), ("--train-on", "last"), ("--joint", "x"), ("--longer", "cut")])
def test_flags_of_conversations_are_refused_for_text(
    flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path / "t.jsonl", {"text": "some text"}, {"text": "other text"})
    assert main([str(tmp_path / "out"), "--data", data, *flags]) == 2
    assert f"error: {flags[0]}: says something of conversations only; add --chat" in capsys.readouterr().err
