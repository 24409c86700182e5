"""Loss curves as pictures, and the colours and labels that all pictures share."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.contract import UsageError

Curve = tuple[list[int], list[float]]  # steps, values

COLOURS = ("#2a6fbb", "#d9662b", "#2f8f5b", "#a0499b", "#b8860b", "#c43c4f", "#3a9fb0", "#6b6b6b")
INK, FAINT = "#333333", "#d9d9d9"
POINTS: dict[str, Any] = {"linewidth": 0.9, "marker": "o", "markersize": 4.5, "markerfacecolor": "white"}
PLAIN: dict[str, Any] = {"parse_math": False}  # a name with $ in it is no formula
LABELLED = len(COLOURS)  # with more curves than this the names move from the line ends to a legend


def loss_curve(
    path_png: Path | str,
    series: Mapping[str, Curve],
    title: str,
    ylabel: str = "loss",
    *,
    held_out: Mapping[str, Curve] | None = None,
    xlabel: str = "step",
    span: int | None = None,
    ylim: tuple[float, float] | None = None,
) -> Path:
    """Draw `series` (name -> steps, values) over steps as a PNG; returns its path.

    Noisy curves are drawn faint, with their moving average over about `span` points on top (None: a fiftieth of the
    points, 1: no average). `held_out` adds measured points to the curve of the same name, or a curve of its own; its
    last value is the one written at the line's end. Values that are not finite are gaps. The y-axis is linear and
    shows where the curves spend their time: a steep start or a spike may leave the picture (`ylim` overrides).
    """
    held_out = held_out or {}
    names = list(dict.fromkeys((*series, *held_out)))
    smooth = {name: average(values, span) for name, (_, values) in series.items()}
    drawn = [*smooth.values(), *(np.asarray(values, dtype=float) for _, values in held_out.values())]
    low, high = ylim or limits(drawn)

    from matplotlib.figure import Figure  # slow to import, and without pyplot there is no global state and no display

    figure = Figure(figsize=(8, 4.6), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for i, name in enumerate(names):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "solid_capstyle": "round"}
        if i >= len(COLOURS):
            style["linestyle"] = (0, (4, 1.5))
        if name in series:
            steps, values = series[name]
            if not np.array_equal(values, smooth[name], equal_nan=True):
                axes.plot(steps, values, alpha=0.22, linewidth=0.7, **style)
            axes.plot(steps, smooth[name], linewidth=1.8, label=name, **style)
        if name in held_out:
            alone: dict[str, Any] = {} if name in series else {"label": name}
            axes.plot(*held_out[name], **POINTS, **style, **alone)
        ending = held_out[name][1] if name in held_out else smooth[name]
        if finite := [y for y in ending if math.isfinite(y)]:
            ends.append((finite[-1], name, style["color"]))

    _dress(axes, title, xlabel, ylabel, (low, high))
    if len(names) > LABELLED:
        legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for text in legend.get_texts():
            text.set(**PLAIN)
    elif len(names) > 1:
        _label_ends(axes, ends, (low, high))
    if series and held_out:
        _explain(axes)
    save(figure, path_png)
    return Path(path_png)


def save(figure: Any, path: Path | str) -> None:
    """Write the picture. What its font cannot draw is a box, and no lines on the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(path)


def average(values: Sequence[float], span: int | None = None) -> np.ndarray:
    """The exponential moving average of `values` over about `span` points.

    It starts at the first value and with a span that grows from one point to all, so it does not trail behind a steep
    start. Values that are not finite stay as they are and do not enter the average.
    """
    span = max(1, len(values) // 50) if span is None else span
    if span < 1:
        raise UsageError(f"span must be at least 1 point, got {span}; 1 means no average")
    out, mean, seen = np.array(values, dtype=float), 0.0, 0
    for i in np.flatnonzero(np.isfinite(out)):
        new = 2 / (min(span, 1 + seen / 10) + 1)
        mean = (1 - new) * mean + new * out[i]
        out[i], seen = mean, seen + 1
    return out


def limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where to look: from the lowest value up to eight times as far as a curve's median, with room to breathe.

    Each curve's last value is inside, however high.
    """
    finite = [c for c in (np.asarray(c, dtype=float)[np.isfinite(c)] for c in curves) if c.size]
    if not finite:
        raise UsageError("nothing to draw: no curve has a finite value; check that the run wrote the metric")
    low = min(c.min() for c in finite)
    high = max(max(c[c <= c.min() + 8 * (np.median(c) - c.min())].max(), c[-1]) for c in finite)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - pad), float(high + pad)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights nearest to the given ones (in rank order) that are `gap` apart: labels that do not overlap."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, int]] = []  # (centre, members), bottom up; touching blocks merge around their mean
    for i in order:
        centre, members = heights[i], 1
        while blocks and blocks[-1][0] + gap * (blocks[-1][1] + members) / 2 > centre:
            below, count = blocks.pop()
            centre, members = (below * count + centre * members) / (count + members), count + members
        blocks.append((centre, members))
    placed = [centre + gap * (k - (n - 1) / 2) for centre, n in blocks for k in range(n)]
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def _dress(axes: Any, title: str, xlabel: str, ylabel: str, ylim: tuple[float, float]) -> None:
    axes.set_ylim(*ylim)
    axes.margins(x=0.01)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10, **PLAIN)
    axes.set_xlabel(xlabel, color=INK, **PLAIN)
    axes.set_ylabel(ylabel, color=INK, **PLAIN)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]], ylim: tuple[float, float]) -> None:
    """Each name and last value in its colour at the right edge, level with its line's end where there is room."""
    heights = spread([min(max(y, ylim[0]), ylim[1]) for y, _, _ in ends], gap=0.048 * (ylim[1] - ylim[0]))
    for (y, name, colour), height in zip(ends, heights, strict=True):
        where = {"xy": (1.01, height), "xycoords": ("axes fraction", "data"), "annotation_clip": False}
        axes.annotate(f"{name}  {y:.4g}", va="center", fontsize=9, color=colour, **PLAIN, **where)


def _explain(axes: Any) -> None:
    """What a line and a marker mean, once for all colours, where the curves are not: top right."""
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "#777777"}
    line = Line2D([], [], linewidth=1.8, label="training", **grey)
    points = Line2D([], [], label="held out", **POINTS, **grey)
    axes.add_artist(axes.legend(handles=[line, points], frameon=False, fontsize=9, loc="upper right", labelcolor=INK))
