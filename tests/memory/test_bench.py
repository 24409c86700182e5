"""Benchmarks: which sides a training step is measured against, and tables that can be read in any terminal."""

import io
import json

import pytest
import torch
from helpers.runs import tool
from rich.console import Console

from models.llama import Llama, LlamaConfig
from tools.bench import polar, refresh, stagger, step, update
from tools.bench.byhand import by_hand
from tools.bench.timing import table

LONGEST = "compiled blocks, checkpoint, AdamW in backward"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("bench", [step, update, polar, refresh, stagger], ids=lambda module: module.__name__)
def test_a_table_can_be_read_in_a_narrow_terminal(bench, width):
    rows = [{"side": side, **dict.fromkeys(bench.SHOWN, 1234.5)} for side in (LONGEST, "segments")]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(rows, bench.SHOWN))
    said = console.file.getvalue()
    assert "…" not in said and all(len(line) <= width for line in said.splitlines())
    heading = next(line for line in said.splitlines() if "side" in line)
    assert all(name in heading for name in bench.SHOWN.values()), "headings stand on one line, whole"
    assert said.count("1.23e+03") == 2 * len(bench.SHOWN), "figures too"


@pytest.mark.run
@pytest.mark.compiles
@pytest.mark.slow
def test_a_step_is_measured_against_equal_switches(tmp_path):
    small = "--hidden 64 --layers 2 --vocabulary 64 --batch 2 --sequence 16 --active 1 --rank 4 --rounds 1 --threads 1"
    done = tool(tmp_path, f"tools.bench step {small} --json found.json")
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["side"] for row in rows] == [
        "torch.compile(model), fused AdamW",
        "compiled blocks, checkpoint, fused AdamW",
        "compiled blocks, checkpoint, AdamW in backward",
        "segments",
        "segments, recompute",
        "segments, OMGD 1 of 2",
        "segments, RSO merged",
        "segments, RSO products",
    ]
    assert rows[0]["time ratio"] == rows[0]["peak ratio"] == 1
    assert all(row["extra peak MB"] > 0 and row["ms"] > 0 for row in rows)


def test_loops_made_by_hand_move_the_weights_as_the_usual_one_does():
    """Uncompiled: the same gradients reach the same optimizer, whenever it runs."""
    shape = LlamaConfig(32, 16, 24, 2, 2, max_position_embeddings=8)
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch, ends = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}, []
    with torch.compiler.set_stance("force_eager"):
        for make in (step.usual, lambda *a: by_hand(*a, False), lambda *a: by_hand(*a, True)):
            model = Llama(shape)
            run = make(model, batch)
            for _ in range(3):
                run()
            ends.append(list(model.parameters()))
    for other in ends[1:]:
        for p, q in zip(ends[0], other, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path):
    done = tool(tmp_path, "tools.bench polar --json nowhere/found.json")
    assert done.code == 2 and done.err.startswith("error: --json nowhere/found.json: "), done.err
