"""Preparing data: the same request gives the same bytes, however often it is interrupted, and nothing leaks."""

import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.data import Tokens, read_index, tokenizer_of
from engine.data import request as requests
from engine.data.prepare import cached, prepare
from engine.data.request import Report, Request
from engine.data.split import digest, hold_out
from engine.data.tokenizer import train_bpe
from optimizers.contract import UsageError
from tools.prepare import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of fifty documents, some of which occur twice."""
    draw, folder = random.Random(0), tmp_path / "corpus"
    folder.mkdir()
    texts = [
        f"document {k}: " + " ".join(draw.choices(["cat", "dog", "sat", "mat", "naïve"], k=draw.randrange(5, 60)))
        for k in range(130)
    ]
    texts += texts[::6][:20]
    for k in range(3):
        lines = (json.dumps({"text": text}) for text in texts[50 * k : 50 * k + 50])
        (folder / f"{k}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BATCH", 2000)


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def texts_of(folder: Path, split: Any) -> list[str]:
    """The documents of a split, read back from its tokens."""
    tokenizer, tokens = tokenizer_of(folder), Tokens(folder, split)
    texts: list[list[int]] = [[]]
    for token in tokens.read(0, len(tokens)).tolist():
        texts[-1].append(token) if token != tokenizer.eos else texts.append([])
    assert texts.pop() == [] and len(texts) == tokens.documents
    return [tokenizer.decode(ids) for ids in texts]


def corpus_texts(folder: Path) -> list[str]:
    return [
        json.loads(line)["text"] for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()
    ]


# What is held out


def test_no_document_is_on_both_sides_and_none_is_lost(corpus: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", Request(data=(str(corpus),), validation_fraction=0.2))
    train, validation = texts_of(out, "train"), texts_of(out, "validation")
    assert sorted(train + validation) == sorted(corpus_texts(corpus))
    assert not set(train) & set(validation)
    assert 0.1 < sum(map(len, validation)) / sum(map(len, train + validation)) <= 0.2
    assert "chosen by a hash" in read_index(out)["held_out"]


def test_the_choice_depends_on_neither_order_nor_grouping(corpus: Path, tmp_path: Path) -> None:
    texts = corpus_texts(corpus)
    random.Random(1).shuffle(texts)
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    a = prepare(tmp_path / "a", Request(data=(str(corpus),), validation_fraction=0.1))
    b = prepare(tmp_path / "b", Request(data=(str(tmp_path / "all.jsonl"),), validation_fraction=0.1))
    assert sorted(texts_of(a, "validation")) == sorted(texts_of(b, "validation"))


def test_at_least_one_document_is_held_out() -> None:
    texts = [f"text {k}" for k in range(30)]
    split = hold_out(lambda: texts, 1e-6)
    held = [text for text in texts for side, _ in split.parts(text) if side == "validation"]
    assert len(held) == 1 and digest(held[0]) == min(map(digest, texts))
    assert split.note.startswith("1 of 30 documents")


def test_a_document_that_is_too_much_of_the_corpus_stays() -> None:
    texts = ["x" * 1000, *(f"text {k}" for k in range(30))]
    assert [side for side, _ in hold_out(lambda: texts, 0.005).parts(texts[0])] == ["train"]


@pytest.mark.parametrize(
    "texts", [["line of text\n" * 100], ["line of text\n" * 100] * 3, ["line of text\n" * 90, "b" * 800]]
)
def test_a_few_large_documents_are_cut_at_the_end_of_a_line(texts: list[str]) -> None:
    split = hold_out(lambda: texts, 0.05)
    (_, train), (_, validation) = split.parts(texts[0])
    assert train + validation == texts[0] and validation.startswith("line of")
    assert 0.03 < len(validation) / sum(map(len, texts)) * texts.count(texts[0]) < 0.1
    assert "the longest document" in split.note


def test_what_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="documents of one character only"):
        hold_out(lambda: ["a"], 0.1)
    for fraction in (0, -1, 0.6, float("nan")):
        with pytest.raises(UsageError, match=r"validation_fraction: got .*; expected more than 0 and at most 0.5"):
            hold_out(lambda: ["abc"], fraction)


def test_validation_data_of_its_own(corpus: Path, tmp_path: Path) -> None:
    first = str(corpus / "0.jsonl")
    out = prepare(tmp_path / "out", Request(data=(str(corpus),), validation=(first,)))
    train, validation = texts_of(out, "train"), texts_of(out, "validation")
    assert validation == corpus_texts(corpus)[:50]
    assert train == [text for text in corpus_texts(corpus) if text not in validation]
    assert "given separately; 59 documents of the data are among them and left out" in read_index(out)["held_out"]
    with pytest.raises(UsageError, match="every document of the data is in the validation data too"):
        prepare(tmp_path / "none", Request(data=(first,), validation=(first,)))


# Same request, same bytes


def test_batches_and_places_do_not_matter(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(prepare(tmp_path / "a", Request(data=(str(corpus),), shard_tokens=3000)))
    assert "train-00003.bin" in expected and "progress.json" not in expected
    monkeypatch.setattr(requests, "BATCH", 1)
    moved = corpus.rename(tmp_path / "moved")
    assert content(prepare(tmp_path / "b", Request(data=(str(moved),), shard_tokens=3000))) == expected


@pytest.mark.parametrize("validation", [(), ("0.jsonl",)])
@pytest.mark.parametrize("bpe", [0, 280])
def test_an_interruption_anywhere_changes_nothing(
    corpus: Path, tmp_path: Path, small_batches: None, validation: tuple[str, ...], bpe: int
) -> None:
    request = Request(
        data=(str(corpus),),
        validation=tuple(str(corpus / name) for name in validation),
        shard_tokens=1000,
        train_bpe=bpe,
    )
    expected = content(prepare(tmp_path / "whole", request))

    class Stop(Exception): ...

    def stopping(after: int) -> Report:
        calls = iter(range(after))

        def report(what: str, done: int, total: int) -> None:
            if next(calls, None) is None:
                raise Stop

        return report

    attempts = 0
    for after in (1, 5, 12, 14, 15, 17, 20, 24):
        try:
            prepare(tmp_path / "broken", request, stopping(after))
        except Stop:
            attempts += 1
        if (tmp_path / "broken/progress.json").exists():  # what a crash may leave beyond what was committed
            for file in (tmp_path / "broken").glob("*.bin"):
                file.write_bytes(file.read_bytes() + b"junk")
            (tmp_path / "broken/train-00099.bin").write_bytes(b"junk")
    assert attempts >= 5
    assert content(prepare(tmp_path / "broken", request)) == expected


@pytest.mark.run
def test_killed_and_started_again(corpus: Path, tmp_path: Path) -> None:
    request = Request(data=(str(corpus),), shard_tokens=1000)
    expected = content(prepare(tmp_path / "whole", request))
    script = f"""
import os, signal
from pathlib import Path
from engine.data import request
from engine.data.prepare import prepare
request.BATCH = 2000
def report(what, done, total):
    if what == "tokenising" and done > 9000:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(Path({str(tmp_path / "out")!r}), request.Request(**{vars(request)!r}), report)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "out/progress.json").read_text())["characters"] > 9000
    with pytest.raises(UsageError, match=r"no index.json: not prepared, or not to the end"):
        Tokens(tmp_path / "out")
    seen: list[int] = []
    prepare(tmp_path / "out", request, lambda what, done, total: seen.append(done) if what == "tokenising" else None)
    assert content(tmp_path / "out") == expected and len(seen) == 1


def test_two_at_once_share_the_work(corpus: Path, tmp_path: Path) -> None:
    """In threads, which the lock keeps apart just as processes: the second waits, and finds the work done."""
    request, started, go_on, said = (
        Request(data=(str(corpus),)),
        threading.Event(),
        threading.Event(),
        queue.Queue[str](),
    )

    def slow(what: str, done: int, total: int) -> None:
        started.set()
        assert go_on.wait(30)

    first = threading.Thread(target=prepare, args=(tmp_path / "out", request, slow))
    second = threading.Thread(
        target=prepare, args=(tmp_path / "out", request, lambda what, done, total: said.put(what))
    )
    first.start()
    assert started.wait(30)
    second.start()
    assert "waiting for another process" in said.get(timeout=30)
    go_on.set()
    first.join(30)
    second.join(30)
    assert said.empty() and content(tmp_path / "out") == content(prepare(tmp_path / "alone", request))


def test_a_finished_folder_is_returned_at_once(corpus: Path, tmp_path: Path) -> None:
    request = Request(data=(str(corpus),))
    out = prepare(tmp_path / "out", request)
    before = [file.stat().st_mtime_ns for file in sorted(out.iterdir())]
    calls: list[str] = []
    assert prepare(out, request, lambda what, done, total: calls.append(what)) == out
    assert calls == [] and before == [file.stat().st_mtime_ns for file in sorted(out.iterdir())]


# Requests that do not fit the folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"validation_fraction": 0.1},
            r"prepared with validation_fraction 0.005, asked for 0.1; choose another folder",
        ),
        ({"shard_tokens": 5}, r"prepared with shard_tokens 134217728, asked for 5"),
        ({"train_bpe": 300}, r"prepared with tokenizer byte, asked for trained, 300"),
        (
            {"data": ("0.jsonl", "2.jsonl")},
            r"prepared with data \['1.jsonl .*3 files'\], asked for \['2.jsonl .*2 files'\]",
        ),
        ({"data": ("0.jsonl", "1.jsonl")}, r"prepared with data \['2.jsonl .*3 files'\], asked for \['2 files'\]"),
        ({"validation": ("0.jsonl",)}, r"prepared with validation \['0 files'\], asked for \['0.jsonl .*'1 files'\]"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_request_for_the_same_folder(
    corpus: Path, tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "tokenising" and not finished:
            raise KeyboardInterrupt

    try:
        prepare(tmp_path / "out", Request(data=(str(corpus),)), stop)
    except KeyboardInterrupt:
        assert (tmp_path / "out/progress.json").exists()
    absolute = {
        key: tuple(str(corpus / v) for v in value) if isinstance(value, tuple) else value
        for key, value in change.items()
    }
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path / "out", Request(**({"data": (str(corpus),)} | absolute)))


def test_changed_data_is_noticed(corpus: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", Request(data=(str(corpus),)))
    (corpus / "1.jsonl").write_text('{"text": "other"}')
    with pytest.raises(UsageError, match="prepared with data .*1.jsonl"):
        prepare(out, Request(data=(str(corpus),)))


def test_bad_data_leaves_a_folder_that_can_be_used(corpus: Path, tmp_path: Path) -> None:
    kept = (corpus / "2.jsonl").read_text()
    (corpus / "2.jsonl").write_text(kept + "\n{")
    with pytest.raises(UsageError, match=r"2.jsonl, line 51: not JSON"):
        prepare(tmp_path / "out", Request(data=(str(corpus),)))
    (corpus / "2.jsonl").write_text(kept)
    assert prepare(tmp_path / "out", Request(data=(str(corpus),)))


def test_folders_and_numbers_that_cannot_be_used(corpus: Path, tmp_path: Path, small_batches: None) -> None:
    data = (str(corpus),)
    with pytest.raises(
        UsageError, match=r"corpus: holds .'0.jsonl'.*but no prepared data; choose an empty or a new folder"
    ):
        prepare(corpus, Request(data=data))
    with pytest.raises(UsageError, match="shard_tokens: got 0; expected at least 1"):
        prepare(tmp_path / "out", Request(data=data, shard_tokens=0))
    with pytest.raises(UsageError, match="train_bpe: got 300, and tokenizer 'x.model'; give one of them"):
        prepare(tmp_path / "out", Request(data=data, train_bpe=300, tokenizer="x.model"))

    def stop(what: str, done: int, total: int) -> None:
        if done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", Request(data=data), stop)
    (tmp_path / "out/train-00000.bin").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"train-00000.bin: shorter than it was, expected .* bytes; delete .*out and start again"
    ):
        prepare(tmp_path / "out", Request(data=data))
    (tmp_path / "out/progress.json").write_text("{")
    with pytest.raises(UsageError, match=r"progress.json: damaged .*; delete .*out and start again"):
        prepare(tmp_path / "out", Request(data=data))


# Tokenizers and the cache


def test_a_trained_tokenizer_lies_in_the_folder(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    request = Request(data=(str(corpus),), train_bpe=5000, validation_fraction=0.1)
    out = prepare(tmp_path / "out", request, lambda what, done, total: said.append(what))
    tokenizer = tokenizer_of(out)
    assert 257 < tokenizer.vocab_size < 5000
    assert any(f"gives no more than {tokenizer.vocab_size:,} tokens of the 5,000 asked for" in line for line in said)
    train, validation = texts_of(out, "train"), texts_of(out, "validation")
    assert sorted(train + validation) == sorted(corpus_texts(corpus))
    assert (out / "tokenizer.json").read_text() == train_bpe(train, 5000) != train_bpe(train + validation, 5000)
    assert len(Tokens(out)) < sum(len(text) for text in train) / 3


def test_a_given_tokenizer_is_copied_and_must_stay_the_same(corpus: Path, tmp_path: Path) -> None:
    trained = prepare(tmp_path / "trained", Request(data=(str(corpus),), train_bpe=300)) / "tokenizer.json"
    out = prepare(tmp_path / "out", Request(data=(str(corpus),), tokenizer=str(trained)))
    assert content(out)["train-00000.bin"] == content(trained.parent)["train-00000.bin"]
    assert tokenizer_of(out.rename(tmp_path / "moved")).vocab_size == 300
    path = tmp_path / "moved/tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(
        UsageError, match=r"moved: got tokenizer tokenizers-\w+, expected tokenizers-\w+; prepare the data again"
    ):
        tokenizer_of(tmp_path / "moved")


@pytest.mark.run
def test_tokens_are_as_wide_as_the_vocabulary(corpus: Path, tmp_path: Path) -> None:
    words = (
        {"<|endoftext|>": 0} | {chr(0x100 + k): k + 1 for k in range(256)} | {f"w{k}": k + 257 for k in range(1 << 16)}
    )
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert read_index(prepare(tmp_path / "narrow", Request(data=(str(corpus),))))["dtype"] == "uint16"
    out = prepare(
        tmp_path / "wide", Request(data=(str(corpus),), tokenizer=str(tmp_path / "vocab.json"), allow_unknown=1.0)
    )
    assert read_index(out)["dtype"] == "uint32" and len(Tokens(out)) > 0


def test_the_cache_goes_by_the_request(corpus: Path, tmp_path: Path) -> None:
    request = Request(data=(str(corpus),))
    first = cached(tmp_path / "cache", request)
    assert first.parent == tmp_path / "cache" and cached(tmp_path / "cache", request) == first
    assert cached(tmp_path / "cache", Request(data=(str(corpus),), shard_tokens=1000)) != first
    assert cached(tmp_path / "cache", Request(data=(str(first),))) == first
    (corpus / "1.jsonl").write_text('{"text": "other"}')
    assert cached(tmp_path / "cache", request) != first


def test_prepared_data_is_not_asked_for_something_else(corpus: Path, tmp_path: Path) -> None:
    data = (str(prepare(tmp_path / "bytes", Request((str(corpus),)))),)
    bpe = prepare(tmp_path / "bpe", Request((str(corpus),), train_bpe=300))
    spec = str(bpe / "tokenizer.json")
    for fine in (Request((str(bpe),)), Request((str(bpe),), tokenizer=spec), Request((str(bpe),), eos="<|endoftext|>")):
        assert cached(tmp_path / "cache", fine) == bpe
    for request, message in (
        (Request(data, tokenizer=spec), r"bytes: prepared with tokenizer byte, asked for tokenizers-\w+; leave it out"),
        (Request((str(bpe),), eos="a"), r"bpe: prepared with eos 0, asked for \d+; leave it out, or prepare again"),
        (Request(data, eos="7"), r"--eos: got '7'; with the tokenizer 'byte' documents end with id 256"),
        (Request(data, field="body"), "bytes: prepared with field text, asked for body"),
        (
            Request(data, validation=(str(corpus),)),
            r"bytes: prepared with validation a part .*, asked for .*corpus",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            cached(tmp_path / "cache", request)


@pytest.mark.run
def test_the_standard_library_is_prepared_unless_data_is_named(tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", Request())
    assert len(Tokens(out)) > 3e6 and len(Tokens(out, "validation")) > 1e4


# The command


def test_the_command_prepares_and_says_what(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(tmp_path / "out"),
        "--data",
        str(corpus / "0.jsonl"),
        str(corpus / "1.jsonl"),
        "--train-bpe",
        "300",
    ]
    assert main([*arguments, "--validation", str(corpus / "2.jsonl"), "--shard-tokens", "2000"]) == 0
    said = capsys.readouterr().out
    for line in ("held out for validation: ", "train: ", "tokens, 50 documents", "vocabulary 300"):
        assert line in said
    assert "\x1b" not in said


def test_the_command_reports_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--data", str(tmp_path / "missing.txt")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_the_command_can_be_interrupted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.prepare.prepare", interrupt)
    assert main([str(tmp_path / "out"), "--data", str(corpus)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
