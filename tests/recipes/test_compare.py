"""Comparisons: finished cells are never run again, the best learning rate is the one that gets more seeds."""

import io
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.grids import few
from helpers.runs import Done, cell_here, here, refused, tool
from rich.console import Console

from optimizers.contract import UsageError
from recipes.compare import Compare, Row, columns, last, load, markdown, narrow, parse, points, rates, steps_to

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--compile",
    "off",
    "--steps",
    "4",
    "--eval-every",
    "2",
    "--eval-windows",
    "2",
    "--sequence",
    "16",
    "--micro-batch",
    "2",
    "--size.hidden-size",
    "16",
    "--size.intermediate-size",
    "16",
    "--size.num-hidden-layers",
    "1",
    "--size.num-attention-heads",
    "2",
]


def line(out: Path, text: Path, methods: list[str], *more: str) -> list[str]:
    return [str(out), "--methods", *methods, *more, "--", *TINY, "--data", str(text)]


def real(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.compare", *line(*words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """A comparison in this process, its cells too, which are else processes of their own."""
    monkeypatch.setattr(subprocess, "run", cell_here(tmp_path))
    return lambda *words: here(tmp_path, shlex.join(["compare", *line(*words)]), ends=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 3))
    return folder


@pytest.mark.run
def test_cells_are_kept_and_the_best_rate_gets_the_other_seeds(tmp_path: Path, corpus: Path, run) -> None:
    out = tmp_path / "compare"
    methods = ["adamw @ 1e-3,1e-2 = baseline", "sgd @ 1e-2 = baseline --optimizer sgd"]
    first = run(out, corpus, methods, "--seeds", "0", "1")
    assert first.code == 0, first.err
    cells = json.loads((out / "cells.json").read_text())
    assert len(cells) == 5  # two rates and one more seed; one rate and one more seed
    adamw = {(c["lr"], c["seed"]): c["loss"] for c in cells.values() if c["method"] == "adamw"}
    best = min((1e-3, 1e-2), key=lambda lr: adamw[lr, 0])
    assert set(adamw) == {(1e-3, 0), (1e-2, 0), (best, 1)}
    assert all(len(c["curve"]) == 2 and c["steps"] == 4 for c in cells.values())
    assert (out / "curves.png").stat().st_size > 10_000
    assert "| adamw |" in (out / "table.md").read_text()

    runs = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    again = run(out, corpus, [*methods, "muon @ 1e-2 = baseline --optimizer muon"], "--seeds", "0", "1")
    assert again.code == 0, again.err
    assert all(path.stat().st_mtime_ns == time for path, time in runs.items()), "a finished cell ran again"
    assert len(json.loads((out / "cells.json").read_text())) == 7


@pytest.mark.run
def test_a_diverged_run_is_a_cell_with_an_infinite_loss_and_a_wrong_flag_is_an_error(
    tmp_path: Path, corpus: Path, run
) -> None:
    out = tmp_path / "compare"
    diverged = run(out, corpus, ["adamw @ 1e30,1e-3 = baseline"])
    assert diverged.code == 0, diverged.err
    assert {c["lr"]: c["loss"] is None for c in json.loads((out / "cells.json").read_text()).values()} == {
        1e30: True,
        1e-3: False,
    }
    wrong = run(out, corpus, ["adamw @ 1e-3 = baseline --no-such-flag"])
    assert wrong.code == 2 and "--no-such-flag" in wrong.err and "Traceback" not in wrong.err


@pytest.mark.parametrize("text", ["adamw", "adamw = baseline", "adamw @ x = baseline", "@ 1 = baseline", "a @ 1 ="])
def test_a_method_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse(text)


def test_steps_to_interpolates_between_evaluations() -> None:
    curve = [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert steps_to(curve, 2.5) == 25
    assert steps_to(curve, 5.0) == 10
    assert steps_to(curve, 1.0) is None


def test_table_counts_steps_to_the_reference_and_marks_rates_at_an_edge() -> None:
    cell = {"steps": 30, "state_bytes": 2e6, "seconds_per_step": 0.5}
    slow = {**cell, "loss": 2.0, "curve": [(10, 4.0), (20, 3.0), (30, 2.0)]}
    fast = {**cell, "loss": 1.0, "curve": [(10, 3.0), (20, 1.0), (30, 1.0)]}
    rows = [Row("slow", 1e-3, False, [slow, {**slow, "loss": 2.0}]), Row("fast", 1e-2, True, [fast])]
    text = markdown(columns(Compare(Path(), ()), rows, "slow")) + rates({"slow": [(1e-3, 2.0), (1.0, math.inf)]})
    assert "| slow | 0.001 | 2.0000 ± 0.0000 (n=2) | 30 (1.00) |" in text
    assert "| fast | 0.01 (edge) | 1.0000 (n=1) | 15 (0.50) |" in text
    assert "1 → inf" in text


def cell(accuracies: list[float], loss: float = 1.0) -> dict[str, object]:
    curves = {"eval/accuracy": [(10 * (i + 1), value) for i, value in enumerate(accuracies)]}
    return {"method": "m", "loss": loss, "curve": [(10, loss)], "curves": curves, "steps": 30, "state_bytes": 2e6}


def test_any_metric_is_compared_in_its_direction() -> None:
    config = Compare(Path(), (), metric="eval/accuracy", best="highest")
    poor, good, lost = cell([0.1, 0.2, 0.4]), cell([0.2, 0.6, 0.7]), cell([], math.inf)
    rows = [Row("poor", 1e-3, False, [poor]), Row("good", 1e-2, False, [good]), Row("lost", 1.0, False, [lost])]
    text = markdown(columns(config, rows, "poor"))
    assert "eval/accuracy, mean ± sd | steps to poor's final eval/accuracy" in text
    assert "| poor | 0.001 | 0.4000 (n=1) | 30 (1.00) | 2.0 | - |" in text
    assert "| good | 0.01 | 0.7000 (n=1) | 15 (0.50) |" in text
    assert "| lost | 1 | -inf (n=1) | not reached |" in text
    assert last(cell([math.nan]), config) == -math.inf
    with pytest.raises(UsageError, match="--metric 'eval/f1': the runs of m have eval/loss, eval/accuracy"):
        points(poor, "eval/f1")


@pytest.mark.run
@pytest.mark.parametrize("apart", few([False, True], False), ids=["in one process", "in processes, as users run it"])
def test_a_run_s_own_metric_is_read_from_its_metrics(tmp_path: Path, corpus: Path, request, apart: bool) -> None:
    out, words = tmp_path / "compare", (["adamw @ 1e-3 = baseline"], "--metric", "eval/perplexity")
    if apart:
        done = real(out, corpus, *words)
        assert done.returncode == 0, done.stderr
    else:
        done = request.getfixturevalue("run")(out, corpus, *words)
        assert done.code == 0, done.err
    (one,) = json.loads((out / "cells.json").read_text()).values()
    assert one["curves"]["eval/perplexity"][-1][1] == pytest.approx(math.exp(one["loss"]))
    assert one["curve"][-1] == [4, one["loss"]], "the last evaluation is the result"
    assert "eval/perplexity" in (out / "table.md").read_text()
    words = shlex.join(line(out, corpus, ["adamw @ 1e-3 = baseline"], "--metric", "eval/bleu"))
    again = tool(tmp_path, f"recipes.compare {words}")
    assert again.code == 2 and "eval/perplexity" in again.err


@pytest.mark.parametrize("wrong", few(["nosuch", "baseline --rnk 3", "snsm demi", "omgd toy"], "baseline --rnk 3"))
def test_methods_are_read_before_the_first_trains(tmp_path: Path, wrong: str) -> None:
    done = tool(tmp_path, f'recipes.compare out --methods "a @ 1e-3 = baseline" "b @ 1 = {wrong}"')
    line = refused(done, 2)
    assert line.startswith("error: --methods: ") and not (tmp_path / "out").exists(), line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_can_be_read_in_a_narrow_terminal(width: int) -> None:
    cells = {"steps": 12000, "state_bytes": 2e9, "seconds_per_step": 12.5, "loss": 12.3456, "curve": [(12000, 12.3456)]}
    rows = [Row("a method of a long name", 5e-4, True, [cells, cells]), Row("b", 1e-2, False, [cells])]
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    texts = columns(Compare(Path(), ()), rows, "b")
    console.print(narrow(texts))
    said = console.file.getvalue()
    assert "…" not in said and all(len(line) <= width for line in said.splitlines())
    for row in texts[1:]:
        for figure in " ".join(row[1:]).split():
            assert figure in said, figure


def test_a_damaged_list_of_cells_is_one_line(tmp_path):
    (tmp_path / "cells.json").write_text("{")
    with pytest.raises(UsageError, match="cells.json: damaged .*; repair it, or move it away"):
        load(tmp_path)
