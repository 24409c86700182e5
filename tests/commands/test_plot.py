"""Curves: what is averaged, where the axis looks, what is read from a run's metrics; and that a picture comes out."""

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
from helpers.grids import few
from hypothesis import given
from hypothesis import strategies as st

from engine.curves import average, limits, loss_curve, spread
from engine.loop.metrics import series
from optimizers.contract import UsageError
from tools.plot import main


def write(run, *records):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return run


def size(png):
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


values = st.lists(st.floats(-100, 100), min_size=1, max_size=60)


@given(values, st.integers(1, 20))
def test_average_stays_within_what_it_averages(values, span):
    got = average(values, span)
    assert got[0] == values[0]
    assert all(min(values) - 1e-9 <= v <= max(values) + 1e-9 for v in got)
    assert average(values, 1).tolist() == values


def test_average_leaves_gaps_and_carries_on_after_them():
    got = average([4.0, math.nan, 4.0, math.inf, 4.0], span=3)
    assert got.tolist()[::2] == [4, 4, 4]
    assert not np.isfinite(got[[1, 3]]).any()


def test_average_removes_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    assert average(noise.tolist(), 40)[500:].std() < 0.3


def test_limits_leave_out_the_start_and_a_spike_but_not_the_end():
    curve = 3 + 7 * np.exp(-np.arange(1000) / 20)
    curve[500] = 90
    low, high = limits([curve])
    assert low < 3 < high < 5
    assert limits([curve, np.array([8.0])])[1] > 8, "a curve's last value is always in the picture"
    assert limits([np.array([2.0])])[0] < 2 < limits([np.array([2.0])])[1]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12))
def test_labels_do_not_overlap_and_keep_their_order(heights):
    got = spread(heights, gap=1.0)
    ranks = sorted(range(len(got)), key=lambda i: heights[i])
    assert all(got[b] - got[a] > 1 - 1e-9 for a, b in pairwise(ranks))
    if all(abs(a - b) > 1 for i, a in enumerate(heights) for b in heights[:i]):
        assert got == pytest.approx(heights)


@pytest.mark.parametrize("curves", few([1, 3, 11], 3))
def test_a_picture_comes_out_and_no_global_state_is_left(tmp_path, curves):
    steps = list(range(100))
    series = {f"run {i}": (steps, [3 + i + math.sin(s) + 50 / (1 + s) for s in steps]) for i in range(curves)}
    held_out = {"run 0": ([50, 99], [3.5, math.nan]), "measured only": ([99], [3.1])}
    assert size(loss_curve(tmp_path / "plain.png", series, "plain")) == (1280, 736)
    assert size(loss_curve(tmp_path / "both.png", series, "both", held_out=held_out)) == (1280, 736)
    assert "matplotlib.pyplot" not in sys.modules


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        loss_curve(tmp_path / "x.png", {"a": ([1], [math.nan])}, "empty")
    assert not list(tmp_path.iterdir())


def test_metrics_of_a_resumed_run_are_read_once(tmp_path):
    run = write(
        tmp_path / "run",
        *({"step": s, "train/loss": 10.0 - s} for s in range(1, 6)),
        {"step": 3, "eval/loss": 6.5},
        {"step": 3, "train/loss": 70.0},  # resumed from step 2
        {"step": 4, "train/loss": None, "eval/loss": 60.0},
        '{"step": 5, "train/lo',  # killed
    )
    steps, values = series(run, "train/loss")
    assert steps == [1, 2, 3, 4]
    assert values[:3] == [9, 8, 70]
    assert math.isnan(values[3])
    assert series(run, "eval/loss") == ([3, 4], [6.5, 60])
    assert series(run, "absent") == ([], [])


def test_a_line_that_a_full_disk_cut_is_left_out(tmp_path):
    run = write(tmp_path / "run", {"step": 1, "train/loss": 2}, '{"step": 2, "tra\n', {"step": 3, "train/loss": 1})
    assert series(run, "train/loss") == ([1, 3], [2.0, 1.0])


def test_command_draws_runs_and_says_what_is_wrong(tmp_path, capsys):
    for name in ("a/run", "b/run"):
        write(tmp_path / name, {"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0, "eval/loss": 2.5})
    out = tmp_path / "out.png"
    assert main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", str(out)]) == 0
    assert size(out) == (1280, 736)
    assert main([str(tmp_path / "c"), "--out", str(out)]) == 2
    assert "metrics.jsonl: not found" in capsys.readouterr().err
    assert main([str(tmp_path / "a/run"), "--out", str(tmp_path / "no/folder.png")]) == 2
