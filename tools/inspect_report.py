"""What `tools.inspect` found, as it is written: JSON, lines for other programs, tables for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.inspection.measures import MEASURES, Look
from engine.inspection.slots import KINDS
from engine.inspection.summary import counts, summary

from .inspect_page import place

HEADINGS = {
    "weight_rms": "weights",
    "update_rms": "update",
    "turn_rate": "turn",
    "update_lost": "lost",
    "basis_error": "QᵀQ−I",
    "first_rms": "M",
    "first_stable_rank": "rank M",
    "first_leading": "top ¼ M",
    "second_stable_rank": "rank V",
    "first_captured": "M in Q",
    "change": "ΔW/W",
    "change_rms": "ΔW/step",
    "change_captured": "ΔW in Q",
    "overlap": "overlap",
    "moment_captured": "M in Q′",
}
BETWEEN = ("change", "change_rms", "change_captured", "overlap", "moment_captured")  # of two checkpoints


class Report(NamedTuple):
    """A checkpoint, looked at. `older` is the path and step of the one that it is compared with."""

    path: str
    step: int
    older: tuple[str, int] | None
    tensors: int  # of the model, of which `looks` may be a part
    looks: list[Look]
    traversal: dict[str, Any] | None

    @property
    def title(self) -> str:
        return f"{self.path}, step {self.step}"


def totals(looks: Sequence[Look]) -> tuple[dict[str, int], int]:
    """Bytes by kind, and what AdamW's moments would take in float32."""
    found = dict.fromkeys(KINDS, 0)
    for one in looks:
        found["weights"] += one.bytes
        for slot in one.slots:
            found[slot.kind] += slot.bytes
    return {kind: size for kind, size in found.items() if size}, sum(8 * math.prod(one.shape) for one in looks)


def plain(report: Report) -> dict[str, Any]:
    """The object that --json prints."""
    sizes, adamw = totals(report.looks)
    numbers = summary(report.looks)
    used = {measure for one in report.looks for measure in one.measures}
    content: dict[str, Any] = {"schema": 1, "path": report.path, "step": report.step}
    if report.older:
        content["compared"] = dict(zip(("path", "step"), report.older, strict=True))
    content |= {"bytes": sizes, "adamw_bytes": adamw}
    content["rules"] = {
        rule: own | {"measures": {k.partition("/")[2]: v for k, v in numbers.items() if k.partition("/")[0] == rule}}
        for rule, own in counts(report.looks).items()
    }
    if report.traversal is not None:
        content["traversal"] = report.traversal
    content["measures"] = {measure: text for measure, text in MEASURES.items() if measure in used}
    content["parameters"] = [
        {"name": one.name, **_owner(one), **one._asdict(), "slots": [slot._asdict() for slot in one.slots]}
        for one in report.looks
    ]
    for parameter in content["parameters"]:
        del parameter["who"]
    finite: dict[str, Any] = _finite(content)
    return finite


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float, digits: int = 4) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes)) or "1"


def state_bytes(one: Look) -> int:
    return sum(slot.bytes for slot in one.slots)


def columns(looks: Sequence[Look]) -> list[str]:
    """The measures that occur, in the order of `MEASURES`."""
    return [measure for measure in MEASURES if any(measure in one.measures for one in looks)]


def headlines(report: Report) -> list[str]:
    """What the checkpoint is and what it takes, a line each."""
    sizes, adamw = totals(report.looks)
    state = sum(size for kind, size in sizes.items() if kind != "weights")
    some = f", {len(report.looks)} of {report.tensors} tensors" if len(report.looks) < report.tensors else ""
    lines = [report.title + some]
    if report.older:
        lines.append("compared with {}, step {}".format(*report.older))
    lines += [f"{kind}: {size:,} bytes ({size / 2**20:.2f} MiB)" for kind, size in sizes.items()]
    lines.append(f"optimizer state: {state / 2**20:.2f} MiB, {state / adamw:.1%} of AdamW's in float32")
    for rule, own in counts(report.looks).items():
        lines.append(
            f"{rule}: {own['tensors']} tensors, {own['elements']:,} elements, {own['active'] / own['elements']:.1%} "
            f"trained now ({own['active_tensors']} tensors), {own['parked_tensors']} tensors parked"
        )
    if report.traversal is not None:
        where = report.traversal
        visits = " ".join(f"{label}:{count}" for label, count in where["visits"].items())
        if "scores" in where:
            scores = " ".join(f"{k}:{'never' if v is None else number(v)}" for k, v in where["scores"].items())
            lines.append(f"the next step trains, chosen by gradient norm: {' '.join(where['active'])}")
            lines.append(f"root-mean-square gradient norms up to the last choice: {scores}")
        else:
            place = f"mask {where['mask'] + 1} of {where['masks']} in cycle {where['cycle'] + 1}"
            lines.append(f"the next step trains {place}: {' '.join(where['active'])}")
        lines.append(f"steps that each has trained: {visits}")
    return lines


def write_plain(report: Report) -> None:
    """Totals as comments, then a row per parameter, separated by tabs."""
    for line in headlines(report):
        print(f"# {line}")
    measures = columns(report.looks)
    print(
        *("name", "rule", "group", "status", "shape", "dtype", "bytes", "state_bytes", "rank", "slots"),
        *measures,
        sep="\t",
    )
    for one in report.looks:
        slots = " ".join(f"{slot.name}:{shape(slot.shape)}:{slot.dtype}" for slot in one.slots)
        rank = "" if one.rank is None else one.rank
        fixed = one.name, one.who.rule, one.who.group, one.status, shape(one.shape), one.dtype, one.bytes
        values = (number(one.measures.get(measure, math.nan)) for measure in measures)
        print(*fixed, state_bytes(one), rank, slots, *values, sep="\t")


def write_rich(report: Report, console: Console) -> None:
    """The same as tables: what the checkpoint holds, and what changed between two."""
    for line in headlines(report):
        console.print(line)
    measures = columns(report.looks)
    for table in tables(report.looks, measures, console.width):
        console.print(table)
    console.print("KiB: of optimizer state")
    for measure in measures:
        console.print(f"{HEADINGS[measure]}: {MEASURES[measure]}", style="dim")


def tables(looks: Sequence[Look], measures: Sequence[str], width: int) -> list[Table]:
    """One table of everything, cut where it would be wider than the terminal, and before what changed between two."""
    names = short(looks)
    head = {
        "parameter": [names[one.name] for one in looks],
        "rule": [one.who.rule if one.status == "active" else f"{one.who.rule}, {one.status}" for one in looks],
    }
    cells = {
        "shape": [shape(one.shape) for one in looks],
        "KiB": [f"{state_bytes(one) / 1024:,.0f}" for one in looks],
        "rank": [str(one.rank or "") for one in looks],
    }
    for measure in measures:
        values = [one.measures.get(measure, math.nan) for one in looks]
        cells[HEADINGS[measure]] = [number(value, 2).replace("e-0", "e-") for value in values]
    groups: list[list[str]] = []
    room = 0
    for heading, texts in cells.items():
        if _width(heading, texts) > room or heading == HEADINGS[BETWEEN[0]]:
            groups.append([])
            room = width - sum(_width(name, left) for name, left in head.items())
        groups[-1].append(heading)
        room -= _width(heading, texts)
    return [_table(head, {heading: cells[heading] for heading in group}) for group in groups]


def _table(left: Mapping[str, Sequence[str]], right: Mapping[str, Sequence[str]]) -> Table:
    """Columns of texts, aligned to the left and to the right."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in zip(*left.values(), *right.values(), strict=True):
        table.add_row(*row)
    return table


def _width(heading: str, texts: Sequence[str]) -> int:
    return max(map(len, (heading, *texts))) + 2


def short(looks: Sequence[Look]) -> dict[str, str]:
    """Names as narrow as a table wants them, "3 q_proj", where that tells all of them apart."""
    found = {one.name: "{} {}".format(*at) if (at := place(one.name)) else one.name for one in looks}
    found = {name: text.removeprefix("model.").removesuffix(".weight") for name, text in found.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def _owner(one: Look) -> dict[str, Any]:
    """Who moves a parameter; what its slots are there for is said with the slots."""
    return {field: value for field, value in one.who._asdict().items() if field != "kinds"}
