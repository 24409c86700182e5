"""GLUE's files and Hugging Face's, read alike; pairs of texts as rows of one length."""

import csv
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.glue import byte_level, tasks, wordpiece

from engine.data.glue import GLUE, Columns, Layout, files, names_of, read
from engine.data.pairs import PairTokenizer
from optimizers.contract import UsageError


def split(folder: Path, task: str, train: bool = True) -> Any:
    return read(files([str(folder)], GLUE[task], train), GLUE[task])


def test_tasks_are_read_from_their_download(tmp_path: Path) -> None:
    tasks(tmp_path)
    rte, cola, stsb = (split(tmp_path, task) for task in ("rte", "cola", "stsb"))
    assert len(rte.texts) == len(cola.texts) == len(stsb.texts) == 40
    assert [len(one.texts[0]) for one in (rte, cola, stsb)] == [2, 1, 2]
    for (_, b), target in zip(rte.texts, rte.targets, strict=True):
        assert target == int("not" in b)
    assert [text for (text,) in cola.texts] == [b for _, b in rte.texts], "the first line is a row"
    assert stsb.targets == [b.count("e") for _, b in stsb.texts]
    assert len(split(tmp_path, "rte", train=False).texts) == 11
    assert split(tmp_path / "RTE", "rte") == rte, "the task's own folder"


ROWS = [
    ("mrpc", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", 'a "b', "c"], 1),
    ("qqp", ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["0", "1", "2", "a", "b", "0"], 0),
    ("qnli", ["index", "question", "sentence", "label"], ["0", "a", "b", "not_entailment"], 1),
    ("mnli", ["index", "sentence1", "sentence2", "label1", "gold_label"], ["0", "a", "b", "x", "contradiction"], 2),
    ("wnli", ["index", "sentence1", "sentence2", "label"], ["0", "a", "b", "1"], 1),
    ("sst2", ["sentence", "label"], ["a 'b ", "0"], 0),
]


@pytest.mark.parametrize(("task", "header", "row", "target"), ROWS, ids=[row[0] for row in ROWS])
def test_the_other_tasks_are_known_by_their_columns(
    tmp_path: Path, task: str, header: list[str], row: list[str], target: int
) -> None:
    folder = tmp_path / GLUE[task].folder
    folder.mkdir()
    with lzma.open(folder / "train.tsv.xz", "wt") as file:
        file.write("\t".join(header) + "\n" + "\t".join(row) + "\n")
    (folder / f"{GLUE[task].held_out}.tsv").write_text("\t".join(header) + "\n" + "\t".join(row) + "\n")
    for train in (True, False):
        found = split(tmp_path, task, train)
        assert found.targets == [target] and all(text in row for text in found.texts[0])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_of_hugging_face_have_numbers_for_labels(tmp_path: Path, suffix: str) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2, "idx": i} for i in range(4)]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == "csv":
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            pa = pytest.importorskip("pyarrow", reason="needs the extra `data`")
            pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), file)
    # a csv's cells are texts, and these are no names of RTE's labels
    layout = GLUE["rte"]._replace(labels=("0", "1")) if suffix == "csv" else GLUE["rte"]
    assert read(files([str(tmp_path)], layout, True), layout).targets == [0, 1, 0, 1] * 2
    assert read(files([str(tmp_path)], layout, False), layout).targets == [0, 1, 0, 1]


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    tasks(tmp_path)
    for layout, said in (
        (
            GLUE["rte"]._replace(columns=(Columns(("sentence1",), "gold"),)),
            "expected one named 'gold'; .*--label-field",
        ),
        (GLUE["rte"]._replace(columns=(Columns(("premise",), "label"),)), "expected one named 'premise'"),
        (
            GLUE["rte"]._replace(labels=("entailment",)),
            "label: got 'not_entailment', expected one of entailment: .*--labels",
        ),
        (GLUE["rte"]._replace(labels=()), "RTE/train.tsv, line 2: label: got 'entailment', expected a number"),
    ):
        with pytest.raises(UsageError, match=said):
            read(files([str(tmp_path)], layout, True), layout)
    hidden = tmp_path / "hidden.jsonl"
    hidden.write_text('{"sentence1": "a", "sentence2": "b", "label": -1}\n')
    with pytest.raises(UsageError, match=r"hidden.jsonl, line 1: label: got '-1', expected one of"):
        read([hidden], GLUE["rte"])
    (tmp_path / "RTE/dev.tsv").rename(tmp_path / "RTE/test.tsv")
    with pytest.raises(UsageError, match=r"RTE: got no held-out split, expected dev.tsv"):
        files([str(tmp_path)], GLUE["rte"], False)
    with pytest.raises(UsageError, match="--data: got .*nowhere"):
        files([str(tmp_path / "nowhere")], GLUE["rte"], True)
    torn = tmp_path / "RTE/train.tsv"
    torn.write_text(torn.read_text() + "3\tonly two\n")
    with pytest.raises(UsageError, match=r"line 42: got 2 fields, .* \(1 such rows\); allowed are 0.00%"):
        read([torn], GLUE["rte"])
    assert read([torn], GLUE["rte"], 0.1).malformed == 1


def test_labels_of_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "kind": kind}) + "\n" for kind in (10, 9, 2)))
    columns = Columns(("text",), "kind")
    assert names_of([file], columns) == ("2", "9", "10")
    layout = Layout("", (columns,), names_of([file], columns), ("accuracy",))
    assert read([file], layout).targets == [2, 1, 0]


@pytest.mark.parametrize("kind", ["wordpiece", "byte-level"])
def test_pairs_are_encoded_as_the_tokenizer_of_the_model_does(tmp_path: Path, kind: str) -> None:
    core = wordpiece() if kind == "wordpiece" else byte_level()
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PairTokenizer(tmp_path)
    pairs = [("the cat sings", "a dog"), ("the small old red bird sees a cat and a dog", "the blue dog runs")]
    found = tokenizer.encode(pairs, np.array([0, 1]), 14)
    rows = found.rows([1, 0, -1], 14, pad=1)
    for i, pair in ((1, pairs[0]), (0, pairs[1])):
        core.enable_truncation(14, strategy="longest_first")
        expected = core.encode(*pair)
        size = len(expected.ids)
        assert rows["input_ids"][i].tolist() == expected.ids + [1] * (14 - size)
        assert rows["token_type_ids"][i].tolist() == expected.type_ids + [0] * (14 - size)
        assert rows["attention_mask"][i].tolist() == [1] * size + [0] * (14 - size)
    assert found.cut == int(len(wordpiece().encode(*pairs[1]).ids) > 14) or kind != "wordpiece"
    assert rows["input_ids"][2].tolist() == [1] * 14 and rows["attention_mask"][2].sum() == 1
    alone = tokenizer.encode([("[SEP] cat",)], np.array([0]), 14)
    assert alone.special.sum() == 2, "text is only ever text"
    with pytest.raises(UsageError, match="--sequence: got 3, expected more than the"):
        tokenizer.encode(pairs, np.array([0, 1]), 3)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"got no tokenizer.json"):
        PairTokenizer(tmp_path)
    core = wordpiece()
    core.post_processor = None
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="adds no special tokens"):
        PairTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"said": "a", "kind": "x"}\n{"said": "b", "kind": null}\n', "line 2: kind: got None"),
        ("a.csv", "said,kind\na,x\nb,\n", "kind: got ''"),
    ],
    ids=["jsonl", "csv"],
)
def test_a_row_without_a_label_makes_no_class(tmp_path: Path, name: str, content: str, said: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UsageError, match=re.escape(said)) as found:
        names_of([file], Columns(("said",), "kind"))
    assert "expected a label; fill it in, or remove the row" in str(found.value)
