"""Tables in narrow terminals: no figure is cut, wrapped or lost."""

import io
import re
from collections.abc import Callable

import pytest
from helpers.grids import covering, few
from rich.console import Console, RenderableType

from engine.inspection.receipt import receipt
from engine.planner.plan import Plan
from optimizers.convert import Row
from recipes.build import build
from recipes.registry import parsed
from recipes.swap import report
from tools.inspect import inspect_fresh
from tools.inspect_report import write_rich
from tools.plan import show

WIDTHS = [60, 80, 160]
LINES = [
    "snsm 1b --model 7b --rank 1024",
    "omgd pretrain --over sumo --model 350m",
    "rso demo",
    "baseline --freeze embed",
]


def drawn(write: Callable[[Console], None], width: int) -> str:
    """What a terminal of that width shows."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None, markup=False, emoji=False
    )
    write(console)
    said = console.file.getvalue()
    assert "…" not in said, said
    return said


def narrow(write: Callable[[Console], None], width: int) -> str:
    said = drawn(write, width)
    assert all(len(line) <= width for line in said.splitlines()), said
    return said


def printed(thing: RenderableType, width: int) -> str:
    return narrow(lambda console: console.print(thing), width)


@pytest.mark.parametrize(("line", "width"), covering(LINES, WIDTHS))
def test_the_receipt(line: str, width: int) -> None:
    run = build(parsed(line.split(), "--line"), 32000)
    said = printed(receipt(run.optimizer, run.params, run.optimizer.init(run.params)), width)
    for group in run.optimizer.owner.values():
        own = [name for name, g in run.optimizer.owner.items() if g.name == group.name]
        assert f"{sum(run.params[name].numel() for name in own):,}" in said
        assert f"{group.lr:g}" in said
    assert "elements" in said and "decay" in said
    for pattern in {pattern for group in run.optimizer.owner.values() for pattern in group.match if len(pattern) < 30}:
        assert pattern in said, "a pattern stands on one line"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_a_swap(width: int) -> None:
    rows = [
        Row("a", "sumo-condition", "galore", "moments kept, the second rebuilt from subset norms", 0.123, 0.456, 12.3),
        Row("b", "sumo-condition", "galore", "moments kept, the second rebuilt from subset norms", 0.789, 0.9, 45.6),
        Row("c", "snsm", "adamw", "fresh", float("nan"), float("nan"), float("nan")),
    ]
    said = printed(report(rows), width)
    for figure in ("0.12 to 0.79", "0.46 to 0.90", "12.30 to 45.60", "first moment kept", "sumo-condition -> galore"):
        assert figure in said


@pytest.mark.parametrize("width", WIDTHS)
def test_the_plan(width: int) -> None:
    kinds = {"activations kept for backward": 123_456_789_012, "optimizer state": 23_456_789_012, "weights": 3 * 10**9}
    total = sum(kinds.values())
    found = Plan(total, "backward of block 12", kinds, {"step": total, "backward of block 12": total}, 3 * 10**9, 10**9)
    said = drawn(lambda console: show(found, "cpu", console, "what training holds at its peak"), width)
    table = [line for line in said.splitlines() if re.search(r"\d,\d{3},", line)]
    assert len(table) == 4 and all(len(line) <= width for line in table)
    for n in (*kinds.values(), total):
        assert f"{n:,}" in said and f"{n / 2**30:.3f}" in said and f"{n / total:.1%}" in said


@pytest.mark.parametrize("width", few(WIDTHS, 60))
def test_the_inspector(width: int) -> None:
    run = build(parsed(["snsm", "1b", "--model", "7b", "--rank", "1024"], "--line"), 32000)
    seen = inspect_fresh("a recipe", run.params, run.optimizer, "layers.(0|31).")
    said = narrow(lambda console: write_rich(seen, console), width)
    for figure in ("11008×4096", "60,459", "1024"):
        assert figure in said
