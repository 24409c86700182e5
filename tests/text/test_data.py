"""Documents from files, windows over tokens, and the order they are trained in."""

import bz2
import gzip
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.texts import prepared

from engine.data import IGNORED, Batches, Tokens, read_index, tokenizer_of
from engine.data.order import order, spaced
from engine.data.prepare import prepare
from engine.data.request import Request
from engine.data.text import documents, standard_library
from engine.data.windows import borders
from optimizers.contract import UsageError

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
}


# Documents


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = "first\r\n\n  second\u2028 line\n"
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACKERS[suffix](text.encode()))
    assert list(documents(path)) == [text]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_jsonl_file_has_a_document_a_line(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "one\u2028\ntwo", "id": 1}, {"text": ""}, {"text": "three"}]
    lines = b"\xef\xbb\xbf" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](lines))
    assert list(documents(path)) == ["one\u2028\ntwo", "three"]


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "", "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "null.parquet")
    parquet.write_table(pyarrow.table({"content": ["one"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert list(documents(tmp_path / "a.parquet")) == ["one", "two"]
    for name, message in (
        ("null", "row 2: got None"),
        ("other", "columns .'content'.; expected one named 'text'"),
        ("broken", "not a parquet file"),
    ):
        with pytest.raises(UsageError, match=message):
            list(documents(tmp_path / f"{name}.parquet"))


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"a.parquet: parquet needs pyarrow.*leanstep\[data\]"):
        list(documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: empty, expected at least one document"),
        ("a.jsonl", b"\n\n", "a.jsonl: empty"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl: empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz: empty"),
        ("a.txt.xz", b"", "a.txt.xz: (empty|damaged or cut short)"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], "a.txt.xz: damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: damaged or cut short"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "a"}')[:-9], "a.jsonl.bz2: damaged or cut short"),
        ("a.txt.xz", b"not packed at all", "a.txt.xz: damaged or cut short"),
        ("a.txt.gz", b"not packed at all", "a.txt.gz: damaged or cut short"),
        ("a.txt.bz2", b"not packed at all", "a.txt.bz2: damaged or cut short"),
        ("a.txt", b"one\ntwo \xff", "a.txt, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"content": "a"}', r"a.jsonl, line 1: got the fields \['content'\]; expected .*'text'"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: got .*'text'"),
        ("a.jsonl", b'["text"]', "a.jsonl, line 1: got .*expected an object"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "a.jsonl, line 1: half a surrogate pair at character 1"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(documents(tmp_path / name))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a.txt: cannot be read \(No such file or directory\)"):
        list(documents(tmp_path / "a.txt"))


@pytest.mark.run
def test_the_standard_library_is_a_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = standard_library()
    texts = [text for file in files for text in documents(file)]
    assert files == standard_library() and {"os.py", "typing.py"} <= {file.name for file in files}
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(file.parts[-3:]) for file in files)
    assert 3e6 < sum(map(len, texts)) < 3e7
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="no sources of its library; name the text to train on"):
        standard_library()


# Windows


@pytest.mark.parametrize("seq", [1, 2, 3, 5, 9, 10, 11, 28, 29])
def test_every_token_but_the_first_is_a_target_once(tmp_path: Path, seq: int) -> None:
    tokens = Tokens(prepared(tmp_path, "abcdefghijklmnopqrstuvwxyz012"))
    text = tokens.read(0, len(tokens))
    assert len(tokens) == 30 and bytes(text[:-1].tolist()).decode() == "abcdefghijklmnopqrstuvwxyz012"
    targets: list[int] = []
    for k in range(tokens.windows(seq)):
        inputs, wanted = tokens.window(k, seq)
        assert inputs.shape == wanted.shape == (seq,) and inputs.dtype == wanted.dtype == np.int64
        for i, target in enumerate(wanted):
            if target != IGNORED:
                targets.append(int(target))
                assert text[len(targets)] == target and text[len(targets) - 1] == inputs[i]
    assert targets == text[1:].tolist()


@pytest.mark.parametrize("shard_tokens", [1, 7, 10, 11, 100])
def test_the_cut_into_files_does_not_show(tmp_path: Path, shard_tokens: int) -> None:
    folder = prepared(tmp_path, "0123456789" * 2, shard_tokens=shard_tokens)
    tokens = Tokens(folder)
    assert len(read_index(folder)["splits"]["train"]["shards"]) == -(-21 // shard_tokens)
    whole = [*b"0123456789" * 2, 256]
    assert all(tokens.read(a, b).tolist() == whole[a:b] for a in range(21) for b in range(a + 1, 22))
    (tmp_path / "one").mkdir()
    assert tokens.fingerprint == Tokens(prepared(tmp_path / "one", "0123456789" * 2, shard_tokens=99)).fingerprint


def test_sequences_that_do_not_fit(tmp_path: Path) -> None:
    tokens = Tokens(prepared(tmp_path, "0123456789"))
    assert tokens.windows(10) == 1
    with pytest.raises(UsageError, match=r"sequence length: got 11, expected less than train's 11 tokens; use shorter"):
        tokens.windows(11)
    with pytest.raises(UsageError, match="sequence length: got 0; expected at least 1"):
        Batches(tokens, 0)


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "0123456789")
    assert tokenizer_of(folder).name == "byte"
    index, shard = (folder / "index.json").read_text(), folder / "train-00001.bin"
    kept = shard.read_bytes()
    for content in (kept[:-1], kept + b"x", None):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UsageError, match=r"train-00001.bin: got \d bytes, expected 8; delete the folder"):
            Tokens(folder)
    for content, message in (
        (index.replace('"schema": 1', '"schema": 9'), "got schema 9, expected 1"),
        (index[:-9], "index.json: damaged"),
        ("{}", "index.json: damaged"),
        ("[]", "index.json: damaged"),
        (None, r"no index.json: not prepared, or not to the end; run python -m tools.prepare"),
    ):
        (folder / "index.json").unlink() if content is None else (folder / "index.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            Tokens(folder)
    with pytest.raises(UsageError, match="no index.json"):
        Tokens(tmp_path / "t.txt")


# Order


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 97, 127, 128, 129, 1023, 1024, 1025, 4097, 10007]
)
def test_an_order_is_a_permutation(n: int) -> None:
    assert sorted(order(5, 3, n, np.arange(n))) == list(range(n))


def test_an_order_can_be_asked_anywhere() -> None:
    whole = order(1, 2, 1000, np.arange(1000))
    places = np.array([999, 0, 17, 17, 500])
    assert order(1, 2, 1000, places).tolist() == whole[places].tolist()
    far = order(1, 2, 10**15, np.array([0, 10**15 - 1]))
    assert (far >= 0).all() and (far < 10**15).all()


def test_orders_differ_by_seed_and_epoch_and_look_random() -> None:
    n = 10000
    orders = [order(seed, epoch, n, np.arange(n)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.04 and (np.diff(a) == 1).sum() < 10
        assert all((a == b).sum() < 10 for b in orders[:i])


def test_every_permutation_and_every_first_place_is_as_likely() -> None:
    """Chi-square against uniform, at four standard deviations; the seeds are fixed, so this never flickers."""
    for n, size, outcome in (
        (4, 24, lambda s: tuple(order(s, 0, 4, np.arange(4)).tolist())),
        (50, 50, lambda s: int(order(s, 0, 50, np.zeros(1))[0])),
    ):
        seen, expected = Counter(outcome(seed) for seed in range(10 * size)), 10
        chi = sum((count - expected) ** 2 / expected for count in seen.values()) + expected * (size - len(seen))
        assert abs(chi - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5, (n, chi)


# Batches


def test_batches_are_a_function_of_the_position(tmp_path: Path) -> None:
    tokens = Tokens(prepared(tmp_path, "abcdefghijklmnopqrstuvwxyz012"))
    batches = Batches(tokens, seq=4, seed=7)
    n = batches.windows
    assert n == 8
    stream = [batches.which(i, 1)[0] for i in range(3 * n)]
    assert all(sorted(stream[e * n : (e + 1) * n]) == list(range(n)) for e in range(3))
    assert stream[:n] != stream[n : 2 * n]
    for size in (1, 3, n, 2 * n + 3):
        assert batches.which(0, size).tolist() == stream[:size]
    for position in (0, 5, n - 1, n, 13):
        batch, again = batches.batch(position, 5), Batches(tokens, seq=4, seed=7).batch(position, 5)
        assert batch["input_ids"].shape == batch["targets"].shape == (5, 4)
        assert batch["input_ids"].dtype == batch["targets"].dtype == torch.int64
        assert all(torch.equal(batch[key], again[key]) for key in ("input_ids", "targets"))
        for row, k in enumerate(stream[position : position + 5]):
            assert batch["targets"][row].tolist() == tokens.window(int(k), 4)[1].tolist()
    assert batches.which(0, n).tolist() != Batches(tokens, seq=4, seed=8).which(0, n).tolist()


def test_an_epoch_of_batches_trains_on_every_target_once(tmp_path: Path) -> None:
    tokens = Tokens(prepared(tmp_path, "abcdefghijklmnopqrstuvwxyz012"))
    batches = Batches(tokens, seq=4)
    targets = batches.batch(2 * batches.windows, batches.windows)["targets"].flatten().tolist()
    assert sorted(t for t in targets if t != IGNORED) == sorted(tokens.read(1, len(tokens)).tolist())


def test_evaluation_goes_once_through_the_text_in_batches_of_one_shape(tmp_path: Path) -> None:
    tokens = Tokens(prepared(tmp_path, "train", validation="abcdefghijklmnopqrstuvwxyz012"), "validation")
    found = list(Batches(tokens, seq=4).evaluation(size=3))
    assert [tuple(batch["targets"].shape) for batch in found] == [(3, 4)] * 3
    targets = torch.cat([batch["targets"].flatten() for batch in found])
    assert targets[targets != IGNORED].tolist() == tokens.read(1, len(tokens)).tolist()
    assert all(
        int(batch["input_ids"].min()) >= 0 and int(batch["input_ids"].max()) < tokens.vocab_size for batch in found
    )


def test_a_part_of_the_held_out_text_is_spread_evenly_over_it(tmp_path: Path) -> None:
    tokens = Tokens(prepared(tmp_path, "train", validation="abcdefghijklmnopqrstuvwxyz012"), "validation")
    batches = Batches(tokens, seq=4)
    assert batches.windows == 8
    limited = list(batches.evaluation(size=3, limit=4))
    assert [tuple(batch["targets"].shape) for batch in limited] == [(3, 4)] * 2
    targets = torch.cat([batch["targets"] for batch in limited])
    assert targets[:4].tolist() == [tokens.window(k, 4)[1].tolist() for k in (1, 3, 5, 7)]
    assert (targets[4:] == IGNORED).all(), "the last batch is filled up with rows without targets"
    assert all(a["targets"].equal(b["targets"]) for a, b in zip(limited, batches.evaluation(3, 4), strict=True)), (
        "the same ones every time"
    )
    for rows in (1, 2, 7, 64, 1000):
        for limit in (1, 3, 64, None):
            chosen = spaced(rows, limit).tolist()
            assert len(set(chosen)) == len(chosen) == min(limit or rows, rows)
            gaps = {b - a for a, b in pairwise([*chosen, chosen[0] + rows])}
            assert max(gaps) - min(gaps) <= 1 and chosen[0] >= 0 and chosen[-1] < rows


# Documents apart


def test_borders_begin_with_the_end_of_the_document_before() -> None:
    documents, positions = borders(np.array([[5, 9, 6, 7, 9, 9, 8], [9, 1, 2, 3, 4, 5, 9]]), eos=9)
    assert documents.tolist() == [[0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2]]
    assert positions.tolist() == [[0, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


def test_windows_say_their_documents_only_where_they_are_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 9)
    request = Request(data=tuple(str(tmp_path / f"{name}.txt") for name in "ab"), validation_fraction=0.3)
    tokens = Tokens(prepare(tmp_path / "two", request))
    joined, apart = Batches(tokens, seq=6), Batches(tokens, seq=6, apart=True)
    batch, more = joined.batch(0, 4), apart.batch(0, 4)
    assert batch.keys() == {"input_ids", "targets"} and more.keys() == {*batch, "documents", "positions"}
    assert all(torch.equal(batch[name], more[name]) for name in batch)
    expected = borders(batch["input_ids"].numpy(), tokens.eos)
    for name, values in zip(("documents", "positions"), expected, strict=True):
        assert more[name].dtype == torch.int64 and more[name].tolist() == values.tolist()
    assert [b["documents"].shape for b in apart.evaluation(3, 1)] == [(3, 6)]
