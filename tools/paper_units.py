"""What papers say of their memory, in their arithmetic, and a run of ours beside it.

Sources: README of OptimAI-Lab/Minimalist_LLM_Pretraining (SCALE, ICML 2026), the table of LLaMA on C4 for 60M to 1B and
that of 7B, whose rows of Adam and Muon are from the paper; Q-GaLore's scripts.
"""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from engine.planner.paper import PaperUnits

SCALE = "SCALE's README"
PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {  # by model and method: GB of weights + state, source
    "60m": {
        "Adam": (0.35, SCALE),
        "Muon": (0.23, SCALE),
        "GaLore": (0.28, SCALE),
        "APOLLO": (0.28, SCALE),
        "APOLLO-Mini": (0.25, SCALE),
        "SCALE": (0.15, SCALE),
    },
    "130m": {
        "Adam": (0.81, SCALE),
        "Muon": (0.54, SCALE),
        "GaLore": (0.61, SCALE),
        "APOLLO": (0.61, SCALE),
        "APOLLO-Mini": (0.46, SCALE),
        "SCALE": (0.32, SCALE),
    },
    "350m": {
        "Adam": (2.21, SCALE),
        "Muon": (1.47, SCALE),
        "GaLore": (1.59, SCALE),
        "APOLLO": (1.59, SCALE),
        "APOLLO-Mini": (1.00, SCALE),
        "SCALE": (0.80, SCALE),
    },
    "1b": {
        "Adam": (8.04, SCALE),
        "Muon": (5.36, SCALE),
        "GaLore": (4.76, SCALE),
        "APOLLO": (4.76, SCALE),
        "APOLLO-Mini": (3.20, SCALE),
        "SCALE": (2.81, SCALE),
    },
    "7b": {
        "Adam": (40.43, "SCALE's paper"),
        "Muon": (26.95, "SCALE's paper"),
        "APOLLO": (16.14, SCALE),
        "APOLLO-Mini": (14.53, SCALE),
        "SCALE": (13.74, SCALE),
    },
}
APART = {"7b": "Q-GaLore says 15.08 to 15.26 GB at 7B: a whole peak at batch 1 (its paper and scripts), so no row here"}


def show(ours: "PaperUnits", model: str, console: Console) -> None:
    """A table of its own, smallest first. Of a `model` that papers do not have, such as "" or "demo", ours alone."""
    table = Table(
        title="weights + state in bf16, as papers count them: no gradients, no activations, no peak",
        title_justify="left",
        box=SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
    )
    table.add_column("run")
    table.add_column("GB", justify="right", no_wrap=True)
    table.add_column("source")
    total = (ours.weights + ours.state) / 1e9
    own = f"this run (weights {ours.weights / 1e9:.2f}, state {ours.state / 1e9:.2f})"
    rows = {**PUBLISHED.get(model, {}), own: (total, "counted")}
    for name, (size, source) in sorted(rows.items(), key=lambda row: row[1][0]):
        table.add_row(name, f"{size:.2f}", source, style="bold" if name == own else "")
    console.print(table)
    if model not in PUBLISHED:
        console.print(f"no paper's figure is known for this model; there are for {', '.join(PUBLISHED)}")
    if model in APART:
        console.print(APART[model], soft_wrap=True)


def published_as(config: object) -> str:
    """The model that papers have, which this run trains: "" where its sizes or its vocabulary are its own."""
    size: object = getattr(config, "size", None)
    shaped = any(value is not None for value in vars(size).values()) if size is not None else False
    own = shaped or getattr(config, "init", None) is not None or getattr(config, "tokenizer", "byte") != "byte"
    return "" if own else str(getattr(config, "model", ""))
