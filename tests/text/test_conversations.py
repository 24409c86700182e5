"""Conversations become prepared folders: every format, its masks, what is refused and where it stands."""

import gzip
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chats import CHATML, INST, THINKING, checkpoint, turns

from engine.data import Tokens, read_index, tokenizer_of
from engine.data import request as requests
from engine.data.chat.prepare import cached, prepare
from engine.data.chat.reader import Examples
from engine.data.chat.request import ChatRequest, looks_like_chat
from engine.data.chat.show import marked
from engine.data.chat.template import load_template
from optimizers.contract import UsageError

SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
PAIR_OF_CHATS = {"prompt": turns("a", "old", "hi"), "completion": [{"role": "assistant", "content": "ho"}]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def made(tmp_path: Path, rows: list[Any], model: Path | str, name: str = "out", **options: Any) -> Path:
    """Rows to train on, prepared with one other as validation."""
    other = dict(json.loads(json.dumps(rows[0]).replace("ho", "hum")))
    data = {"data": (write(tmp_path / "t.jsonl", rows),), "validation": (write(tmp_path / "v.jsonl", [other]),)}
    return prepare(tmp_path / name, ChatRequest(**data, tokenizer=str(model), **options))


def shown(folder: Path, k: int = 0) -> str:
    """An example's text with what is trained in brackets."""
    ids, trained = Examples(folder).read(k)
    return marked(tokenizer_of(folder), ids.tolist(), trained.tolist(), colour=False).plain


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": turns("hi", "ho", system="s")}, "system\ns<|im_end|>\n"),
        ({"conversations": SHARE, "system": "s"}, "system\ns<|im_end|>\n"),
        ({"conversations": SHARE}, ""),
        ({"prompt": "hi", "completion": "ho"}, ""),
        ({"instruction": "hi", "input": "", "output": "ho", "text": "of all"}, ""),
        ({"instruction": "hi", "output": "ho", "history": [["a", "b"]]}, "assistant\nb<|im_end|>\n"),
        (PAIR_OF_CHATS, "assistant\nold<|im_end|>\n"),
    ],
)
def test_formats_are_found_by_their_keys(row: Any, expected: str, tmp_path: Path, model: Path) -> None:
    text = shown(made(tmp_path, [row], model))
    assert text.endswith("user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ho<|im_end|>⟧\n")
    assert text.count("⟦") == (2 if "history" in row else 1)
    assert expected in text.replace("⟦", "").replace("⟧", "")


def test_names_of_fields(tmp_path: Path, model: Path) -> None:
    rows = [{"question": "hi", "answer": "ho"}]
    with pytest.raises(UsageError, match=r"got the fields \['answer', 'question'\]; expected .*--prompt-field"):
        made(tmp_path, rows, model)
    named = {"prompt_field": "question", "completion_field": "answer"}
    assert shown(made(tmp_path, rows, model, "named", **named)).endswith("⟦ho<|im_end|>⟧\n")
    with pytest.raises(UsageError, match="belong together"):
        made(tmp_path, rows, model, "half", prompt_field="question")


MAWPS = (
    {"iIndex": 1, "sQuestion": "Joan has 70.0 shells.", "lEquations": ["X=(70.0-27.0)"], "lSolutions": [43.0]},
    {"Question": "Joan has N_00 shells.", "Numbers": "70.0 27.5", "Equation": "- N_00 N_01", "Answer": 42.5},
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            MAWPS[0],
            "user\nJoan has 70.0 shells.<|im_end|>\n<|im_start|>assistant\n⟦X=(70.0-27.0)\n#### 43<|im_end|>⟧\n",
        ),
        (MAWPS[1], "user\nJoan has 70 shells.<|im_end|>\n<|im_start|>assistant\n⟦- 70 27.5\n#### 42.5<|im_end|>⟧\n"),
    ],
)
def test_word_problems_with_an_equation_and_a_number(
    row: dict[str, Any], expected: str, tmp_path: Path, model: Path
) -> None:
    other = json.loads(json.dumps(row).replace("Joan", "John"))
    data = {"data": (write(tmp_path / "t.jsonl", [row]),), "validation": (write(tmp_path / "v.jsonl", [other]),)}
    folder = prepare(tmp_path / "out", ChatRequest(**data, tokenizer=str(model)))
    assert shown(folder).endswith(expected) and "format: mawps" in read_index(folder)["format"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sQuestion": ""}, "line 2: sQuestion: got ''; expected a text"),
        ({"lSolutions": [1.0, 2.0]}, r"line 2: lSolutions: got \[1.0, 2.0\]; expected a list of one"),
        ({"lSolutions": ["x"]}, "line 2: the solution: got 'x'; expected a number"),
        ({"lEquations": [7]}, "line 2: the equation: got '7'; expected a text"),
        ({"Question": "N_02 shells"}, "line 2: Question: got N_02 where Numbers has 2"),
        ({"Numbers": "x 1"}, "line 2: Numbers: got 'x'; expected a number"),
    ],
)
def test_word_problems_that_are_not_whole(change: dict[str, Any], expected: str, tmp_path: Path, model: Path) -> None:
    good = MAWPS[0] if next(iter(change)) in MAWPS[0] else MAWPS[1]
    with pytest.raises(UsageError, match=expected):
        made(tmp_path, [good, good | change], model)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.xz"])
def test_every_kind_of_file(suffix: str, tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"how many, {k}?", "completion": f"{k}"} for k in range(1, 6)]
    path, kind = tmp_path / f"data{suffix}", suffix.split(".")[1]
    data = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps({"data": rows}),
        "csv": "completion,prompt\n" + "".join(f'{row["completion"]},"{row["prompt"]}"\n' for row in rows),
    }.get(kind, "")
    packer = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.split(".")[-1], bytes)
    path.write_bytes(packer(data.encode()))
    if kind == "parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"prompt": [r["prompt"] for r in rows], "completion": list("12345")}), path)
    folder = prepare(tmp_path / "out", ChatRequest(data=(str(path),), tokenizer=str(model)))
    both = Examples(folder), Examples(folder, "validation")
    assert sum(map(len, both)) == 5 and len(both[1]) == 1
    assert both[0].place(0).startswith(f"data{suffix}, {'row' if kind in ('json', 'parquet') else 'line'} ")
    assert looks_like_chat(ChatRequest(data=(str(path),)))


def test_conversations_in_parquet(tmp_path: Path, model: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    said = [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "ho", "name": None}]
    parquet.write_table(pyarrow.table({"messages": [said, said[:1] + turns("", "hum")[1:]]}), tmp_path / "m.parquet")
    folder = prepare(tmp_path / "out", ChatRequest(data=(str(tmp_path / "m.parquet"),), tokenizer=str(model)))
    assert "assistant\n⟦h" in shown(folder)


# Without a template


def test_plain_texts_where_there_is_no_template(tmp_path: Path) -> None:
    bare = checkpoint(tmp_path / "bare", None)
    assert shown(made(tmp_path, [{"prompt": "hi", "completion": "ho"}], bare)) == "hi⟦ho<|im_end|>⟧"
    assert shown(made(tmp_path, [{"prompt": "hi", "completion": "ho"}], bare, "b", joint="\n")) == "hi\n⟦ho<|im_end|>⟧"
    assert shown(made(tmp_path, [{"text": "hi ho"}], bare, "c")) == "h⟦i ho<|im_end|>⟧"
    put = shown(made(tmp_path, [{"instruction": "hi", "input": "you", "output": "ho"}], bare, "d"))
    assert put.endswith("### Instruction:\nhi\n\n### Input:\nyou\n\n### Response:⟦ho<|im_end|>⟧")
    assert put.startswith("Below is an instruction that describes a task, paired with an input")
    with pytest.raises(UsageError, match=r"messages needs a chat template, and .*bare has none; expected chat_t"):
        made(tmp_path, [{"messages": turns("hi", "ho")}], bare, "e")
    model = checkpoint(tmp_path / "model")
    assert shown(made(tmp_path, [{"prompt": "hi", "completion": "ho"}], model, "f", render="plain")) == (
        "hi⟦ho<|im_end|>⟧"
    )
    with pytest.raises(UsageError, match="--render template needs a chat template"):
        made(tmp_path, [{"prompt": "hi", "completion": "ho"}], "byte", "g", render="template")


def test_bytes_are_a_tokenizer_too(tmp_path: Path) -> None:
    folder = made(tmp_path, [{"prompt": "naïve ", "completion": "é🙂 ho"}], "byte")
    ids, trained = Examples(folder).read(0)
    assert bytes(ids[trained][:-1].tolist()).decode() == "é🙂 ho" and ids[-1] == 256 and trained[-1]


# Tokens and masks


def test_ids_are_those_of_the_whole_text_as_transformers_has_them(tmp_path: Path, model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    chat = turns("the question was four?", "the answer is naïve 🙂", "a", "b\n", system="how many")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(model))
    ids, _ = Examples(made(tmp_path, [{"messages": chat}], model)).read(0)
    assert ids.tolist() == theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]


def test_a_token_across_the_border_of_an_answer_is_trained(tmp_path: Path) -> None:
    """One token holds the end of the prompt and the start of the answer: to write the answer is to write it."""
    bare = checkpoint(tmp_path / "bare", None, ("ab ab ab",) * 9)
    folder = made(tmp_path, [{"prompt": "xa", "completion": "b ho"}], bare)
    assert shown(folder) == "x⟦ab ho<|im_end|>⟧"
    assert read_index(folder)["across"] == 2  # the validation example's, too
    assert tokenizer_of(folder).encode("xab") == Examples(folder).read(0)[0][:2].tolist()


def test_marks_in_the_data_itself_are_counted_and_said(tmp_path: Path, model: Path) -> None:
    rows = [
        {"messages": turns("hi", "ho")},
        {"messages": turns("hi<|im_end|>", "ho")},
        {"messages": turns("x", "<|end|>")},
    ]
    said: list[str] = []
    request = ChatRequest(data=(write(tmp_path / "t.jsonl", rows),), tokenizer=str(model))
    prepare(tmp_path / "out", request, lambda what, done, total: said.append(what))
    line = "2 examples with a mark in the text itself, read as one; the first: '<|im_end|>' in t.jsonl, line 2"
    assert said.count(line) == 1
    assert not [line for line in said if "with a mark" in line and "2 examples" not in line]


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_what_the_tokenizer_cannot_say_is_counted_and_refused(unknown: str | None, tmp_path: Path) -> None:
    words = {letter: k for k, letter in enumerate("hio ")} | ({unknown: 4} if unknown else {})
    core = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token=unknown))
    core.add_special_tokens(["</s>"])
    core.save(str(tmp_path / "tokenizer.json"))
    rows = [{"prompt": "hi ", "completion": "ho"}, {"prompt": "hé! ", "completion": "ho</s>"}]
    with pytest.raises(UsageError, match=r"4 of 21 characters .*in 2 documents, .* such as 'é!um'; .*t.jsonl, line 2"):
        made(tmp_path, rows, tmp_path)  # um: of the validation example
    folder = made(tmp_path, rows, tmp_path, "lenient", allow_unknown=0.5)
    assert read_index(folder)["unknown"]["characters"] == 4
    ids, trained = Examples(folder).read(1)
    assert [core.id_to_token(i) for i in ids[trained].tolist()] == ["h", "o", "</s>", "</s>"], "whatever was lost"


def test_about_the_fraction_is_held_out_whole(tmp_path: Path) -> None:
    rows = [{"prompt": f"{k:03}" * (1 + k % 3), "completion": "yes" * (k % 4 + 1)} for k in range(200)]
    request = ChatRequest(data=(write(tmp_path / "t.jsonl", [*rows, *rows[:9]]),), validation_fraction=0.2)
    folder = prepare(tmp_path / "out", request)
    sides = Examples(folder), Examples(folder, "validation")
    said = [{bytes(side.read(k)[0][:-1].tolist()) for k in range(len(side))} for side in sides]
    assert not said[0] & said[1] and len(said[0] | said[1]) == 200 and sum(map(len, sides)) == 209
    characters = [(side.sizes - 1).sum() for side in sides]  # bytes, and an end
    assert 0.18 < characters[1] / sum(characters) <= 0.2


def test_one_long_example_does_not_hold_out_all_others(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": turns(f"hi {k}", "ho" * (20_000 if k == 3 else 1))} for k in range(20)]
    request = ChatRequest(data=(write(tmp_path / "t.jsonl", rows),), tokenizer=str(model), validation_fraction=0.02)
    assert len(Examples(prepare(tmp_path / "out", request), "validation")) <= 4


def test_the_folder_keeps_the_template(tmp_path: Path, model: Path) -> None:
    folder = made(tmp_path, [{"messages": turns("hi", "ho")}], model)
    kept, own = load_template(folder), load_template(model)
    assert kept and own and kept.fingerprint == own.fingerprint and kept.source == CHATML


# What is refused, with its place


@pytest.mark.parametrize(
    ("template", "rows", "expected"),
    [
        (CHATML, [{"messages": turns("a", "")}], r"t.jsonl, line 2: message 2 \(assistant\) is empty"),
        (CHATML, [{"messages": []}], "line 2: messages: got '\\[\\]'; expected a list of at least one"),
        (CHATML, [{"messages": [{"role": "user"}]}], "line 2: messages, message 1: no content"),
        (CHATML, [{"messages": "hi"}], "line 2: got the fields .* as in the first row"),
        (CHATML, ["x"], "line 2: got 'x'; expected an object"),
        (CHATML, [{"messages": turns("a", "\ud800")}], "line 2: half a surrogate pair"),
        (INST, [{"messages": turns("a", "b", system="s")}], "line 2: the chat template refuses .*must alternate"),
        (
            THINKING,
            [{"messages": turns("a", "b", "c", "d")}],
            "line 2: the chat template changes .*--train-on last",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on(template: str, rows: list[Any], expected: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", template)
    good = {"messages": turns("hi", "ho")}
    with pytest.raises(UsageError, match=expected):
        made(tmp_path, [good, *rows], model)
    folder = made(tmp_path, [good, *rows], model, "lenient", allow_malformed=0.9)
    assert len(Examples(folder)) == 1 and read_index(folder)["passed"]["malformed"] == 1


def test_a_role_that_nobody_knows(tmp_path: Path, model: Path) -> None:
    rows = [{"conversations": [{"from": "bird", "value": "x"}, SHARE[1]]}]
    with pytest.raises(UsageError, match="line 1: conversations, message 1: from: got 'bird'; expected one of"):
        made(tmp_path, rows, model)


def test_what_does_not_go_together(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": turns("hi", "ho")}]
    for options, expected in (
        ({"field": "body"}, "--field body"),
        ({"train_bpe": 300}, "--train-bpe"),
        ({"template_date": "today"}, "--template-date: got 'today'"),
        ({"render": "plain"}, "messages cannot be plain texts"),
    ):
        with pytest.raises(UsageError, match=expected):
            made(tmp_path, rows, model, **options)
    with pytest.raises(UsageError, match="one example only"):
        prepare(tmp_path / "one", ChatRequest(data=(write(tmp_path / "t.jsonl", rows),), tokenizer=str(model)))
    folder = made(tmp_path, rows, model, "good")
    with pytest.raises(UsageError, match="holds conversations with masks, expected text"):
        Tokens(folder)


# Restartable, the same bytes


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.run
def test_an_interruption_anywhere_changes_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"how many, {k}?" * (k % 5 + 1), "completion": f"{k}" * (k % 7 + 1)} for k in range(60)]
    path = write(tmp_path / "t.jsonl", rows)
    request = ChatRequest(data=(path,), tokenizer=str(model), shard_tokens=700, validation_fraction=0.2)
    expected = content(prepare(tmp_path / "whole", request))
    assert {"mask-train-00001.bin", "examples-validation-00000.bin", "chat_template.jinja"} <= expected.keys()
    monkeypatch.setattr(requests, "BATCH", 900)

    class Stop(Exception):
        pass

    for stop_after in range(1, 8):
        seen = 0

        def report(what: str, done: int, total: int, stop_after: int = stop_after) -> None:
            nonlocal seen
            seen += what == "tokenising"
            if seen == stop_after:
                raise Stop

        out = tmp_path / f"out{stop_after}"
        with pytest.raises(Stop):
            prepare(out, request, report)
        for name in ("mask-train-00000.bin", "examples-train-00000.bin"):  # as if more had been on the disk
            with (out / name).open("ab") as file:
                file.write(b"\1" * 16)
        assert content(prepare(out, request)) == expected


def test_a_prepared_folder_is_found_again(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": f"{k}?", "completion": f"{k}"} for k in range(9)])
    request = ChatRequest(data=(path,), tokenizer=str(model))
    folder = cached(tmp_path / "cache", request)
    before = content(folder)
    assert cached(tmp_path / "cache", request) == folder and content(folder) == before
    assert cached(tmp_path / "cache", ChatRequest(data=(path,), tokenizer=str(model), train_on="all")) != folder
    assert cached(tmp_path / "x", ChatRequest(data=(str(folder),), tokenizer=str(model))) == folder
    with pytest.raises(UsageError, match="prepared with train_on 'assistant', asked for 'last'"):
        cached(tmp_path / "x", ChatRequest(data=(str(folder),), train_on="last"))
    model_without = checkpoint(tmp_path / "other", INST)
    assert cached(tmp_path / "cache", ChatRequest(data=(path,), tokenizer=str(model_without))) != folder
