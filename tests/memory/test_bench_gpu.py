"""The command that measures on a GPU: its rows survive what goes wrong, and at toy size it runs on a CPU."""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import tool

from tools.bench.gpu import sides
from tools.bench.gpu.command import CUDA, TOY, main, measurements
from tools.bench.gpu.rows import Rows


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_before_the_next_and_an_error_is_one(tmp_path, monkeypatch):
    said: list[str] = []
    rows = Rows(tmp_path, 60, {"device": "none"}, said.append)

    def fails() -> dict:
        assert lines(tmp_path)[1]["ms"] == 2.5, "the first row"
        raise RuntimeError("out of memory\nand more")

    rows.measure("Speed", "a", lambda: {"ms": 2.5})
    rows.measure("Speed", "b|c", fails)
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    rows.measure("Peaks", "d", fails)
    found = lines(tmp_path)
    assert found[0] == {"head": {"device": "none"}} and found[2]["error"] == "RuntimeError: out of memory"
    assert found[3]["not measured"] == "the time was up"
    page = (tmp_path / "table.md").read_text()
    assert page.index("## Speed") < page.index("| a | 2.5 |") < page.index("| b/c |") < page.index("## Peaks")
    assert len(said) == 3


def test_the_operations_of_a_model_are_counted():
    """By hand, at 1 token: 6 a weight in a product, and attention over one token."""
    shape = sides.SIZES["toy"]
    inside = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert sides.flops("toy", 1) == 6 * (inside + 32 * shape.vocab_size + 2 * 1 * 32)


@pytest.mark.parametrize("sizes", [CUDA, TOY])
def test_every_table_is_asked_for_and_correctness_comes_first(sizes):
    tables = list(dict.fromkeys(table for table, _, _ in measurements(torch.device("cpu"), sizes)))
    assert tables[0] == "Each rule against the CPU" and len(tables) == 5 + len(sizes.speed)
    assert all(size in sides.SIZES for size, _ in (*sizes.speed, *sizes.peaks))


@pytest.mark.parametrize(("words", "said"), [("--minutes 0", "--minutes: got 0"), ("--only x9", "--only: got 'x9'")])
def test_what_makes_no_sense_is_said(words, said, tmp_path, capsys):
    assert main([*words.split(), "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.compiles
def test_a_toy_runs_on_a_cpu(tmp_path):
    done = tool(tmp_path, "tools.bench gpu --out found --minutes 20")
    assert done.code == 0, done.err
    rows = lines(tmp_path / "found")[1:]
    assert not [row for row in rows if "error" in row]
    assert {row["apart over gone"] for row in rows if row["table"].startswith("Each rule")} == {0.0}
    assert all(row["equal to the bit"] for row in rows if row["table"].startswith("Resumes"))
    assert all(row["tokens/s"] > 0 for row in rows if row["table"].startswith("Speed"))
    assert all(row["planned GiB"] > 0 for row in rows if row["table"] == "Peaks")
