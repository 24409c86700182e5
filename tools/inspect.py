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
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from engine import checkpoint
from engine.checkpoint import CheckpointError, Reader
from engine.checkpoint.rules import RuleRecord, described, read_rules
from engine.inspection.measures import Look, compared, look
from engine.terminal.flags import ask
from engine.terminal.output import printable
from engine.terminal.paths import writable
from optimizers.contract import Optimizer, Params, Slots, UsageError
from optimizers.wrappers.choice import describe, owned_keys

from .inspect_page import draw
from .inspect_report import Report, plain, totals, write_plain, write_rich
from .source import newest

NOBODY = RuleRecord("frozen", "frozen")  # who owns what no rule moves


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


def opened(path: Path, what: str = "PATH") -> Reader:
    """The checkpoint that is meant; damaged ones that are passed over are named on stderr."""
    if os.path.exists(path / checkpoint.TRAINER) or (checkpoint.STEP.fullmatch(path.name) and path.is_dir()):
        return checkpoint.read(path)
    found = newest(path, what).reader()
    assert found is not None
    return found


def inspect(path: Path, compare: Path | None = None, match: str = "") -> Report:
    """Look at every parameter that matches. Raises CheckpointError, UsageError."""
    reader, older = opened(path), opened(compare, "--compare") if compare else None
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
        owner = optimizer.owner.get(name)
        who = described(owner) if owner else NOBODY
        looks.append(look(name, params[name], state.get(name), who))
    masks = describe(optimizer.metadata, params, 0, state) if "traversal" in optimizer.metadata else None
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
    unknown = reader.owners.keys() - reader.params.names.keys() - set(owned_keys(reader.header))
    if unknown:
        raise CheckpointError(
            f"{reader.path}: has state of {sorted(unknown)[:3]}, which are no parameters of its model"
        )
    owners, others = (read_rules(one.state) if one else {} for one in (reader, older))
    stateful = reader.owners.keys() & reader.params.names.keys()  # the others are frozen, or buffers of batch norm
    if owners and (odd := (owners.keys() - reader.params.names.keys()) | (stateful - owners.keys())):
        raise CheckpointError(f"{reader.state.file}: damaged, its head and the model disagree on {sorted(odd)[:3]}")
    config = reader.trainer.get("config")
    rounded = not isinstance(config, dict) or config.get("precision") != "bf16-sr"
    tied = set()
    for name in names:
        if (first := reader.params.names[name]) in tied:
            continue  # one tensor under two names is moved and counted once
        tied.add(first)
        p, slots = _one(reader, name)
        if slots is None and not p.is_floating_point():
            continue  # a counter of batch norm
        who = owners.get(name, NOBODY if owners else RuleRecord())
        try:
            seen = look(name, p, slots, who, rounded)
        except CheckpointError as error:
            raise CheckpointError(f"{reader.state.file}: {error}") from None
        if older is not None:
            if name not in older.params.names:
                raise CheckpointError(f"{older.path}: has no parameter {name}; compare checkpoints of the same model")
            before, held = _one(older, name)
            if before.shape != p.shape:
                got = f"{tuple(before.shape)}, expected {tuple(p.shape)}"
                raise CheckpointError(f"{older.path}: {name} is {got}; compare checkpoints of the same model")
            past = others.get(name, NOBODY if others else RuleRecord())
            look(name, before, held, past)  # whether its slots are its own
            between = compared((before, held or {}, past), (p, slots or {}, seen.who), reader.step - older.step)
            seen = seen._replace(measures=seen.measures | between)
        yield seen


def _one(reader: Reader, name: str) -> tuple[torch.Tensor, Slots | None]:
    """A parameter as it is trained, and its slots if it has state."""
    p = reader.trained(name)
    if not p.is_floating_point() and name in reader.owners:
        raise CheckpointError(f"{reader.params.file}: {name} is {p.dtype}, expected floating point")
    return p, reader.slots(name) if name in reader.owners else None


def _traversal(reader: Reader) -> dict[str, Any] | None:
    """Where a traversal of masks stands, if the optimizer has one."""
    if "traversal" not in reader.header:
        return None
    try:
        shapes = {name: torch.empty(reader.params.shape(name), device="meta") for name in reader.params.names}
        own = {key: reader.slots(key) for key in owned_keys(reader.header)}
        return describe(reader.header, shapes, reader.step, own)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{reader.state.file}: damaged, its head's traversal is unreadable: {error}") from None


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
    printable()
    try:
        args = ask(lambda prog: tyro.cli(Inspect, prog=prog, args=argv, description=__doc__))
        if (args.path is None) != bool(args.fresh):
            raise UsageError("expected the PATH of a run or a checkpoint, or --fresh and a recipe; one of the two")
        if args.png:
            writable(args.png, "--png")
        if args.path is None:
            if args.compare:
                raise UsageError("--compare: a fresh state has not moved yet; give the PATH of a checkpoint")
            write(fresh(args.fresh, args.match), args.json, args.png)
            return 0
        write(inspect(args.path, args.compare, args.match), args.json, args.png)
    except CheckpointError as error:
        return _fail(error, 5)
    except UsageError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    return 0


def fresh(line: str, match: str = "") -> Report:
    """What a recipe with its flags would save before its first step. Raises UsageError."""
    from recipes.build import build  # slow to import
    from recipes.registry import parsed, words

    config = parsed(words(line, "--fresh"), "--fresh")
    run = build(config, config.vocabulary())
    return inspect_fresh(f"recipes.{line}", run.params, run.optimizer, match)


def _fail(error: Exception, code: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
