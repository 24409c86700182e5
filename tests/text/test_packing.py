"""Examples are packed by best fit into rows that know where each begins; what is too long is said, with its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chats import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from engine.data import IGNORED
from engine.data.chat.packing import Packed, fit, supervised
from engine.data.chat.prepare import prepare
from engine.data.chat.reader import Examples, best_fit
from engine.data.chat.request import ChatRequest
from optimizers.contract import UsageError


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    return made(tmp_path, [("a" * (3 + 7 * k % 11), "b" * (1 + k % 5)) for k in range(40)])


def made(tmp_path: Path, pairs: list[tuple[str, str]], **options: Any) -> Examples:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in pairs))
    (tmp_path / "v.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}))
    data = {"data": (str(tmp_path / "t.jsonl"),), "validation": (str(tmp_path / "v.jsonl"),)}
    return Examples(prepare(tmp_path / "out", ChatRequest(**data, **options)))


@given(st.lists(st.integers(0, 50), max_size=80), st.integers(0, 3))
def test_best_fit_loses_nothing_and_leaves_no_room_for_what_was_put_elsewhere(sizes: list[int], seed: int) -> None:
    rows = best_fit(sizes, 50, seed)
    assert sorted(k for row in rows for k in row) == list(range(len(sizes)))
    fill = [sum(sizes[k] for k in row) for row in rows]
    assert all(0 <= f <= 50 for f in fill) and rows == best_fit(sizes, 50, seed)
    for k, row in enumerate(rows):  # the example that opened a row fits into no row before it
        assert all(f + sizes[row[0]] > 50 for f in fill[:k]) or not sizes[row[0]]
    assert len(rows) <= 11 / 9 * (sum(sizes) / 50 + 1) + 1 + sizes.count(0)


def test_the_fullest_row_that_has_room() -> None:
    assert [sorted(row) for row in best_fit([6, 7, 3, 4, 2], 10)] == [[1, 2], [0, 3], [4]]
    assert [sorted(row) for row in best_fit([6, 7, 2, 4], 10)] == [[1, 2], [0, 3]]
    assert [sorted(row) for row in best_fit([7, 5, 3], 10)] == [[0, 2], [1]], "not where it leaves room"


def test_rows_hold_every_example_once_and_start_anew_with_each(examples: Examples) -> None:
    packed = Packed(examples, 32, seed=3)
    batch = packed.batch(0, len(packed.rows))
    assert {name: t.shape[0] for name, t in batch.items()} == dict.fromkeys(batch, len(packed.rows))
    found = []
    for ids, targets, positions, documents in zip(
        *(batch[n].numpy() for n in ("input_ids", "targets", "positions", "documents")), strict=True
    ):
        for document in range(documents.max() + 1):
            at = np.flatnonzero(documents == document)
            assert (positions[at] == np.arange(len(at))).all() and (np.diff(at) == 1).all()
            if (targets[at] != IGNORED).any():
                found.append((ids[at].tolist(), targets[at].tolist()))
            else:
                assert (ids[at] == examples.eos).all()
    expected = []
    for k in range(len(examples)):
        ids, trained = examples.read(k)
        expected.append((ids[:-1].tolist(), np.where(trained[1:], ids[1:], IGNORED).tolist()))
    assert sorted(found) == sorted(expected)
    assert packed.filled == sum(len(ids) for ids, _ in expected) / (32 * len(packed.rows)) > 0.9


def test_a_position_alone_says_the_rows(examples: Examples) -> None:
    packed = Packed(examples, 32, seed=3, align=4)
    whole = packed.batch(0, 3 * packed.epochs.length)
    for position, size in ((0, 5), (7, 9), (packed.epochs.length - 2, 4)):
        for name, values in packed.batch(position, size).items():
            if name != "supervised":
                assert torch.equal(values, whole[name][position : position + size]), name
    again = Packed(examples, 32, seed=4).batch(0, 8)["input_ids"]
    assert not torch.equal(again, whole["input_ids"][:8])


def test_one_example_a_row_where_padding_is_asked_for(examples: Examples) -> None:
    packed = Packed(examples, 32, pack=False)
    assert len(packed.rows) == len(examples)
    batch = packed.batch(0, 1)
    assert batch["documents"].unique().tolist() == [0, 1]
    assert (batch["targets"][batch["documents"] == 1] == IGNORED).all()


def test_evaluation_reads_the_same_rows_and_fills_the_last_batch_with_blanks(examples: Examples) -> None:
    packed = Packed(examples, 32)
    rows = list(packed.evaluation(4, 6))
    assert [len(batch["targets"]) for batch in rows] == [4, 4]
    assert (rows[1]["targets"][2:] == IGNORED).all() and (rows[1]["targets"][:2] != IGNORED).any()
    total = sum(int((batch["targets"] != IGNORED).sum()) for batch in packed.evaluation(4))
    assert total == examples.trained.sum()


def test_places_of_what_is_supervised() -> None:
    targets = np.full((2, 32), IGNORED)
    targets[0, [3, 9, 10, 30, 31]] = 1
    places = supervised(targets)
    assert places.shape == (2, 8) and places[0, :5].tolist() == [3, 9, 10, 30, 31]
    assert (np.take_along_axis(targets, places, 1)[:, 5:] == IGNORED).all()
    assert supervised(np.zeros((1, 32), np.int64)).shape == (1, 32)
    assert supervised(np.full((1, 32), IGNORED)).shape == (1, 4)
    assert supervised(np.zeros((1, 3), np.int64)).shape == (1, 3)


# Longer than the sequence


def test_what_is_longer_is_refused_cut_or_left_out(tmp_path: Path) -> None:
    examples = made(tmp_path, [("a" * 4, "b" * 4), ("a" * 4, "b" * 20), ("a" * 4, "b" * 30)])
    with pytest.raises(UsageError, match=r"2 examples of 3 longer .* of 10 tokens; the longest, t.jsonl, line 3,"):
        Packed(examples, 10)
    cut = fit(examples, 10, "cut")
    assert (cut.kept, cut.cut, cut.tokens) == ((0, 1, 2), 2, 14 + 24)
    assert cut.in_words(10) == "longer than 10 tokens: 2 examples cut (38 tokens not trained on)"
    rows = Packed(examples, 10, longer="cut").batch(0, 3)
    assert int((rows["targets"] != IGNORED).sum()) == 5 + 7 + 7
    out = fit(examples, 10, "leave-out")
    assert (out.kept, out.left_out, out.tokens) == ((0,), 2, 25 + 35)
    with pytest.raises(UsageError, match=r"t.jsonl, line 1: cut to 3 tokens, of which none is trained"):
        fit(examples, 3, "cut")
    with pytest.raises(UsageError, match="every example is longer than 3 tokens"):
        fit(examples, 3, "leave-out")
    with pytest.raises(UsageError, match="sequence length: got 0"):
        fit(examples, 0)


def test_an_example_of_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    examples = made(tmp_path, [("p" * 50_000, "c" * 50_000), ("a", "b")])
    with pytest.raises(UsageError, match=r"1 example of 2 longer .*line 1, has 100,001: use a longer --sequence"):
        Packed(examples, 2048)


def test_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    examples = made(tmp_path, [("how many?", "four"), ("the", "answer")], tokenizer=str(model))
    batch = Packed(examples, 128).batch(0, 1)
    assert batch["documents"].max() == 2 and batch["input_ids"].dtype == torch.int64
