"""The page that `tools.inspect --png` draws: bytes by kind, spectra of moments by depth, stable ranks, overlaps."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.curves import COLOURS, FAINT, INK, PLAIN, save
from engine.inspection.measures import Look

PLACE = re.compile(r"^(.*?)\.(\d+)\.(.+?)(?:\.weight)?$")  # stem, layer, matrix
MAPS = (("first_stable_rank", "stable rank of the first moment"), ("overlap", "overlap of the bases, ‖QᵀQ′‖² / r"))
CHANGE = ("change", "change of the weights, ‖ΔW‖ / ‖W‖")


def draw(path: Path, looks: Sequence[Look], sizes: Mapping[str, int], adamw: int, title: str) -> None:
    """Draw the page. Panels without anything to show are left out."""
    from matplotlib.figure import Figure  # slow to import

    grids = [(text, grid(looks, measure)) for measure, text in (*MAPS, CHANGE)]
    grids = [(text, found) for text, found in grids if found[2].size and np.isfinite(found[2]).any()]
    spectra = [one for one in looks if one.spectra and place(one.name)]
    panels = len(grids) + bool(spectra)
    rows = 1 + -(-panels // 2)
    tall = max([len(found[0]) for _, found in grids], default=8)
    heights = [1.1, *[max(3.2, 0.24 * tall + 1.2)] * (rows - 1)]
    figure = Figure(figsize=(13, sum(heights) + 1.2), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, **PLAIN)
    cells = figure.add_gridspec(rows, 2, height_ratios=heights)
    _bytes(figure.add_subplot(cells[0, :]), sizes, adamw)
    free = iter([figure.add_subplot(cells[1 + i // 2, i % 2]) for i in range(panels)])
    if spectra:
        _spectra(figure, next(free), spectra)
    for text, found in grids:
        _heat(figure, next(free), text, found)
    save(figure, path)


def place(name: str) -> tuple[int, str] | None:
    """(layer, matrix) of a name such as model.layers.3.mlp.up_proj.weight."""
    found = PLACE.match(name)
    return (int(found[2]), found[3].rpartition(".")[2]) if found else None


def grid(looks: Sequence[Look], measure: str) -> tuple[list[int], list[str], np.ndarray]:
    """Layers, matrices, and the measure by layer and matrix; NaN where there is none."""
    found = {at: one.measures[measure] for one in looks if measure in one.measures and (at := place(one.name))}
    layers, kinds = sorted({layer for layer, _ in found}), list(dict.fromkeys(kind for _, kind in found))
    return layers, kinds, np.array([[found.get((layer, kind), math.nan) for kind in kinds] for layer in layers])


def _bytes(axes: Any, sizes: Mapping[str, int], adamw: int) -> None:
    """Two bars: this checkpoint, and the same weights under AdamW."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if sum(sizes.values()) >= u), (1024, "KiB"))
    colours = {
        kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(["weights", *(k for k in sizes if k != "weights")])
    }
    left = 0.0
    for kind, size in sizes.items():
        label = f"{kind}  {size / unit:,.2f} {name}"
        axes.barh([1], [size / unit], left=left, color=colours[kind], label=label, height=0.62)
        left += size / unit
    weights = sizes.get("weights", 0) / unit
    axes.barh([0], [weights], color=colours["weights"], height=0.62)
    axes.barh(
        [0],
        [adamw / unit],
        left=weights,
        color="#b9b9b9",
        height=0.62,
        label=f"AdamW's state  {adamw / unit:,.2f} {name}",
    )
    axes.set_yticks([1, 0], ["this", "AdamW, float32"])
    axes.set_xlabel(name, color=INK, fontsize=8)
    axes.set_title(" ", fontsize=10)  # room for the legend, which must not make the page wider
    legend = axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=8, labelcolor=INK)
    legend.set_in_layout(False)
    _clean(axes)


def _spectra(figure: Any, axes: Any, looks: Sequence[Look]) -> None:
    """A line a matrix, its largest singular value 1, coloured by depth."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depths = [at[0] for one in looks if (at := place(one.name))]
    scale = Normalize(min(depths), max(max(depths), min(depths) + 1))
    for one, depth in zip(looks, depths, strict=True):
        values = np.array(next(iter(one.spectra.values())))
        if values[0] > 0:
            axes.plot(
                np.arange(1, len(values) + 1),
                values / values[0],
                color=colormaps["viridis"](scale(depth)),
                linewidth=0.8,
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-6))
    axes.set_title("leading singular values of the first moment", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("direction", color=INK)
    axes.set_ylabel("of the largest", color=INK)
    figure.colorbar(
        ScalarMappable(scale, colormaps["viridis"]),
        ax=axes,
        label="layer",
        ticks=sorted(set(depths))[:: 1 + len(set(depths)) // 8],
    )
    axes.grid(color=FAINT, linewidth=0.6)
    _clean(axes)


def _heat(figure: Any, axes: Any, text: str, found: tuple[list[int], list[str], np.ndarray]) -> None:
    """Layers by matrices, each value written where there is room."""
    layers, kinds, values = found
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(kinds) > 4 else {}
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8, **slanted)
    every = 1 + len(layers) // 24
    axes.set_yticks(range(0, len(layers), every), layers[::every], fontsize=8)
    axes.set_ylabel("layer", color=INK)
    axes.set_title(text, loc="left", fontsize=10, color=INK)
    if len(layers) <= 24:
        middle = np.nanmax(values) / 2
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    colour = "black" if value > middle * 1.3 else "white"
                    axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes)
    _clean(axes)


def _clean(axes: Any) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=0, labelsize=8)
