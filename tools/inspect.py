"""What is in a checkpoint, parameter by parameter: `python -m tools.inspect RUN`; or what one would hold, before
anything is allocated: `python -m tools.inspect --fresh "snsm 1b --model 7b --rank 1024"`.

Prints a table on a terminal. Piped, it prints lines that start with "# " (totals) and then tab-separated values with a
heading. Tensors are read one at a time. Exit codes: 0 done, 1 failure, 2 bad arguments, 5 unusable checkpoint.

--json prints one object:

    schema       1
    path, step   the checkpoint (the recipe, with --fresh), and how many optimizer steps it has behind it
    compared     {path, step} of the older of the two, with --compare
    bytes        {kind: bytes} of weights and optimizer state
    adamw_bytes  what AdamW's moments would take in float32
    rules        {rule: {elements, active, parked, tensors, active_tensors, parked_tensors, measures}}
    traversal    which masks have been visited, where the optimizer has any
    measures     {measure: what it is} of those that occur
    parameters   [{name, group, rule, lr, weight_decay, options, status, shape, dtype, bytes, active, rank,
                 slots: [{name, kind, shape, dtype, bytes}], measures: {measure: number or null},
                 spectra: {slot: leading singular values}}]

`active` counts elements that are trained now. A measure is null where it cannot be told, as of a moment of zeros.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine import checkpoint
from engine.checkpoint import CheckpointError, Reader
from engine.inspection import KINDS, MEASURES, Look, compared, counts, look, summary
from engine.ownership import Who, described, read_rules
from optimizers.core import PARKED, Optimizer, Params, Slots, UsageError
from optimizers.traversal import describe

from .inspect_page import draw, place

HEADINGS = {
    "weight_rms": "weights",
    "update_rms": "update",
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


@dataclass(frozen=True)
class Inspect:
    """What is in a checkpoint: who trains what, how large it is, how it is doing."""

    path: tyro.conf.Positional[Path | None] = None
    """A run's folder, of which the newest whole checkpoint is used, or one step-* folder."""
    fresh: str = ""
    """In the place of PATH a recipe and its flags: what it would save before its first step."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""
    png: Path | None = None
    """Draw a page with bytes, spectra and stable ranks."""
    compare: Path | None = None
    """Another checkpoint of the same model: how far weights and bases moved from one to the other."""
    match: str = ""
    """Only parameters whose name this regular expression finds."""


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


def find(path: Path) -> Path:
    """The checkpoint folder that is meant; damaged ones that are passed over are named on stderr."""
    if (path / checkpoint.TRAINER).exists() or checkpoint.STEP.fullmatch(path.name):
        return path
    found = checkpoint.latest(path)
    for folder, why in found.damaged:
        print(f"skipped {folder.name}: {why}", file=sys.stderr)
    if found.path is None and found.damaged:
        raise CheckpointError(f"{path}: none of its {len(found.damaged)} checkpoints is whole")
    if found.path is None:
        raise UsageError(f"PATH: got {str(path)!r}, expected a folder of step-* checkpoints, or one of them")
    return found.path


def inspect(path: Path, compare: Path | None = None, match: str = "") -> Report:
    """Look at every parameter that matches. Raises CheckpointError, UsageError."""
    reader, older = checkpoint.read(find(path)), checkpoint.read(find(compare)) if compare else None
    if older is not None and older.step > reader.step:
        reader, older = older, reader
    looks = list(_looks(reader, older, matching(reader.params.names, match)))
    before = (str(older.path), older.step) if older else None
    tensors = len(set(reader.params.names.values()))
    return Report(str(reader.path), reader.step, before, tensors, looks, _traversal(reader))


def inspect_fresh(what: str, params: Params, optimizer: Optimizer, match: str = "") -> Report:
    """The state that `optimizer` begins with. `params` may have no memory (device "meta"). Raises UsageError."""
    state, looks = optimizer.init(params), []
    for name in matching(params, match):
        parked = name not in state and PARKED + name in state
        who = described(optimizer.owner[name])
        looks.append(look(name, params[name], state.get(PARKED + name if parked else name), who, parked))
    masks = describe(optimizer.about, params, 0) if "traversal" in optimizer.about else None
    return Report(what, 0, None, len(params), looks, masks)


def matching(names: Iterable[str], match: str) -> list[str]:
    """Those that the regular expression finds. Raises UsageError where it is none, or finds nothing."""
    try:
        found = [name for name in names if re.search(match, name)]
    except re.error as error:
        raise UsageError(f"--match: got {match!r}, which is no regular expression: {error}") from None
    if not found:
        raise UsageError(f"--match: {match!r} finds none of the parameters, such as {list(names)[:3]}")
    return found


def _looks(reader: Reader, older: Reader | None, names: Sequence[str]) -> Iterator[Look]:
    unknown = {owner.removeprefix(PARKED) for owner in reader.owners} - reader.params.names.keys()
    if unknown:
        raise CheckpointError(
            f"{reader.path}: has state of {sorted(unknown)[:3]}, which are no parameters of its model"
        )
    owners, others = (read_rules(one.state) if one else {} for one in (reader, older))
    if owners and (odd := owners.keys() ^ reader.params.names.keys()):
        raise CheckpointError(f"{reader.state.file}: damaged, its head and the model disagree on {sorted(odd)[:3]}")
    config = reader.trainer.get("config")
    rounded = not isinstance(config, dict) or config.get("precision") != "bf16-sr"
    tied = set()
    for name in names:
        if (first := reader.params.names[name]) in tied:
            continue  # one tensor under two names is moved and counted once
        tied.add(first)
        p, slots, parked = _one(reader, name)
        try:
            seen = look(name, p, slots, owners.get(name, Who()), parked, rounded)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.state.file}: {error}") from None
        if older is not None:
            if name not in older.params.names:
                raise CheckpointError(f"{older.path}: has no parameter {name}; compare checkpoints of the same model")
            before, held, was_parked = _one(older, name)
            if before.shape != p.shape:
                got = f"{tuple(before.shape)}, expected {tuple(p.shape)}"
                raise CheckpointError(f"{older.path}: {name} is {got}; compare checkpoints of the same model")
            who = others.get(name, Who())
            look(name, before, held, who, was_parked)  # whether its slots are its own
            between = compared((before, held or {}, who), (p, slots or {}, seen.who), reader.step - older.step)
            seen = seen._replace(measures=seen.measures | between)
        yield seen


def _one(reader: Reader, name: str) -> tuple[torch.Tensor, Slots | None, bool]:
    """A parameter, its slots if it has state, and whether that is parked."""
    parked = name not in reader.owners and PARKED + name in reader.owners
    owner = PARKED + name if parked else name
    p = reader.params.read(name)
    if not p.is_floating_point():
        raise CheckpointError(f"{reader.params.file}: {name} is {p.dtype}, expected floating point")
    return p, reader.slots(owner) if owner in reader.owners else None, parked


def _traversal(reader: Reader) -> dict[str, Any] | None:
    """Where a traversal of masks stands, if the optimizer has one."""
    if "traversal" not in reader.header:
        return None
    try:
        shapes = {name: torch.empty(reader.params.shape(name), device="meta") for name in reader.params.names}
        return describe(reader.header, shapes, reader.step)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{reader.state.file}: damaged, its head's traversal is unreadable: {error}") from None


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
        {"name": one.name, **one.who._asdict(), **one._asdict(), "slots": [slot._asdict() for slot in one.slots]}
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


def write(report: Report, json_: bool, png: Path | None) -> None:
    """As the command line asks for it."""
    console = Console(markup=False, emoji=False, highlight=False)
    try:
        if json_:
            print(json.dumps(plain(report), indent=1))
        elif console.is_terminal:
            write_rich(report, console)
        else:
            write_plain(report)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if png:
        draw(png, report.looks, *totals(report.looks), report.title)
        print(png, file=sys.stderr if json_ else sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(Inspect, args=argv, description=__doc__)
    try:
        if (args.path is None) != bool(args.fresh):
            raise UsageError("expected the PATH of a run or a checkpoint, or --fresh and a recipe; one of the two")
        if args.path is None:
            return _ask(args)
        write(inspect(args.path, args.compare, args.match), args.json, args.png)
    except CheckpointError as error:
        return _fail(error, 5)
    except UsageError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    return 0


def _ask(args: Inspect) -> int:
    """Have the recipe, as a process, answer in the place of training; returns its exit code. Raises UsageError."""
    recipe, *flags = shlex.split(args.fresh) or [""]
    if not recipe.isidentifier():
        raise UsageError(f"--fresh: got {args.fresh!r}, expected a recipe and its flags, such as 'snsm 1b --model 7b'")
    if args.compare:
        raise UsageError("--compare: a fresh state has not moved yet; give the PATH of a checkpoint")
    png = str(args.png) if args.png else None
    asked = {"inspect": args.fresh, "json": args.json, "png": png, "match": args.match}
    return subprocess.call([sys.executable, "-m", f"recipes.{recipe}", *flags, "--plan", json.dumps(asked)])


def _fail(error: Exception, code: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
