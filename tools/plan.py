"""The memory that a training run will need, before any of it is allocated.

    python -m tools.plan snsm 60m                                                 any recipe, with any of its flags
    python -m tools.plan baseline --model 7b --optimizer galore --rank 1024 --precision bf16 --device cuda
    python -m tools.plan snsm 1b --model 7b --rank 1024 --micro-batch 4 --fit 24GiB     what to change so that it fits

--fit SIZE         propose recompute, then a smaller micro-batch (more of them: as many tokens a step), then bases and
                   moments in fewer bytes, then another --rest, then a smaller rank or fewer active layers, until the
                   peak is below SIZE (24GiB, 800MiB, 16GB)
--paper-units      a second table: weights and state as papers count them, in bf16, beside what they say
--json             the same as JSON
--help             after a recipe's name: its own flags
--vocabulary N     tokens that the model knows; by default those of --tokenizer, or without one the preset's

Exit codes: 0 it fits, or a proposal does, or nothing was asked; 2 bad arguments; 3 nothing fits.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.terminal.command import pasted, typed
from engine.terminal.output import printable
from optimizers.contract import Kind, UsageError, idle

from . import paper_units

if TYPE_CHECKING:
    from engine.planner.plan import Plan

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SMALLER = ("rank", "active")  # flags that trade quality for memory, tried last
SHORTER = {  # flags by which the state takes fewer bytes, what loses least first
    "bases_dtype": ("fp32", "bf16"),
    "moments_dtype": ("fp32", "bf16", "int8"),
    "rest": ("adamw", "adam_sn", "scale"),
}
LEAST = 4  # no rank below this is proposed
Config = Any  # a recipe's frozen dataclass


class Asked(NamedTuple):
    """What the command line asks beside the recipe and its flags."""

    fit: int | None
    json: bool
    vocabulary: int
    paper_units: bool


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code. The recipe's own parser reads its flags, and --help after a recipe's name lists them."""
    printable()
    usage = f"usage: {typed()} RECIPE [ITS FLAGS] [--fit SIZE] [--json] [--vocabulary N] [--paper-units]"
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{usage}\n\n{__doc__}")
        return 0
    if not arguments:
        print(f"{usage}\nerror: no recipe given; see {typed()} --help", file=sys.stderr)
        return 2
    from recipes.registry import parsed  # slow to import

    try:
        asked, command = own_flags(arguments)
        return answer(parsed(command, typed()), asked)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def own_flags(arguments: Sequence[str]) -> tuple[Asked, list[str]]:
    """This tool's flags, wherever they stand, and the rest. Raises UsageError."""
    fit, as_json, vocabulary, papers, rest = None, False, 0, False, list[str]()
    words = iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--json" and not value:
            as_json = True
        elif flag == "--paper-units" and word == flag:
            papers = True
        elif flag in ("--fit", "--vocabulary"):
            value = value if "=" in word else next(words, "")
            try:
                if flag == "--fit":
                    fit = size(value)
                else:
                    vocabulary = positive(value)
            except ValueError as error:
                raise UsageError(f"{flag}: {error}") from None
        else:
            rest.append(word)
    return Asked(fit, as_json, vocabulary, papers), rest


def size(text: str) -> int:
    """Bytes of "24GiB", "800 MB". Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(B|[KMG]i?B)", text.strip(), re.IGNORECASE)
    found = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not found:
        raise ValueError(f"got {text[:40]!r}, expected a size above 0 with its unit, such as 24GiB or 800MB")
    return found


def positive(text: str) -> int:
    """A whole number above 0. Raises ValueError for anything else."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise ValueError(f"got {text[:40]!r}, expected a whole number above 0, below 1,000,000,000")
    return int(text)


def answer(config: Config, asked: Asked) -> int:
    """Plan `config`, print, and look for what fits. Returns the exit code. Raises UsageError."""
    from recipes.plan import device_of, in_paper_units, planned  # slow to import

    def measure(config: Config) -> "Plan":
        return planned(config, asked.vocabulary)

    limit, first, device = asked.fit, measure(config), device_of(config)
    content: dict[str, Any] = {"asked": plain(first), "device": device}
    fits = limit is None or first.bytes <= limit
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    if not asked.json:
        show(first, device, console, "what a run holds at its peak, from start-up to the last save")
    if asked.paper_units:
        ours = in_paper_units(config, asked.vocabulary)
        content["paper_units"] = ours._asdict()
        if not asked.json:
            paper_units.show(ours, "" if asked.vocabulary else paper_units.published_as(config), console)
    if limit is not None:
        need = gib(first.bytes)
        said, content["fits"], content["limit"] = f"{need} fits in {gib(limit)}", fits, limit
        if not fits:
            said = f"{need} does not fit in {gib(limit)}, and nothing does that --fit tries"
            if getattr(config, "clip", "") == "global":
                said += "; --clip global holds all gradients at once, --clip previous does not"
            if found := proposal(config, limit, measure):
                flags, fits = changed(config, found[0]), True
                said = f"{need} does not fit in {gib(limit)}; this does, at {gib(found[1].bytes)}: {flags}"
                content["proposal"] = {"flags": flags, **plain(found[1])}
        if not asked.json:
            console.print(said, soft_wrap=True)
    if asked.json:
        print(json.dumps(content, indent=1))
    return 0 if fits else 3


def candidates(config: Config) -> Iterator[Iterator[Config]]:
    """Runs that hold less and less: a group a means, in order of preference, each from mildest to strongest."""

    def replaced(base: Config, **changes: Any) -> Config:
        return dataclasses.replace(base, **changes)

    recomputed = replaced(config, recompute=True)
    if not config.recompute:
        yield iter([recomputed])
    sequences = config.micro_batch * config.accumulation
    counts = [n for n in range(config.micro_batch - 1, 0, -1) if sequences % n == 0]
    yield (replaced(recomputed, micro_batch=n, accumulation=sequences // n) for n in counts)
    least = replaced(recomputed, micro_batch=1, accumulation=sequences)
    for name, wanted in SHORTER.items():
        now = getattr(config, name, None)
        if now not in wanted or (name == "bases_dtype" and not config.rule().names(Kind.BASIS)):
            continue
        shorter = [replaced(least, **{name: value}) for value in wanted[wanted.index(now) + 1 :]]
        if shorter:
            yield iter(shorter)
            least = shorter[-1]
    options = getattr(config, "options", None)  # of the rule, where a recipe has one
    for name in SMALLER:
        inside = not hasattr(config, name)
        now = getattr(options if inside else config, name, None)
        if type(now) is int and not (inside and name in idle(options)):
            smaller = [{name: n} for n in halves(now) if n >= (LEAST if name == "rank" else 1)]
            yield (replaced(least, **({"options": replaced(options, **n)} if inside else n)) for n in smaller)


def halves(n: int) -> Iterator[int]:
    """n/2, n/4 ..., down to 1."""
    while n > 1:
        n //= 2
        yield n


def proposal(config: Config, limit: int, measure: Callable[[Config], "Plan"]) -> "tuple[Config, Plan] | None":
    """The mildest candidate that fits with its plan. Of each group the strongest is planned first: where that does not
    fit, none of the group does."""
    for group in map(list, candidates(config)):
        if not group or measure(group[-1]).bytes > limit:
            continue
        for candidate in group:
            if (found := measure(candidate)).bytes <= limit:
                return candidate, found
    return None


def changed(before: Config, after: Config) -> str:
    """The flags that make `after` of `before`."""
    found = {f"--{n}".replace("_", "-"): v for n, v in differing(before, after).items() if n != "options"}
    if hasattr(after, "options"):
        found |= {after.flag_of(n): v for n, v in differing(before.options, after.options).items()}
    return pasted(*(word for flag, v in found.items() for word in ([flag] if v is True else [flag, str(v)])))


def differing(before: Any, after: Any) -> dict[str, Any]:
    """The fields in which one dataclass differs from another of its kind."""
    values = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    return {name: value for name, value in values.items() if value != getattr(before, name)}


def show(plan: "Plan", device: str, console: Console, title: str) -> None:
    """A row a kind of tensor, then the total and the moments that come near it."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("part")
    for heading in ("bytes", "GiB", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    small = 0
    for kind, n in plan.kinds.items():
        if n < plan.bytes / 1000:
            small += n
        else:
            table.add_row(kind, f"{n:,}", f"{n / 2**30:.3f}", f"{n / plan.bytes:.1%}")
    if small:
        table.add_row(
            "all that is smaller than 0.1 %", f"{small:,}", f"{small / 2**30:.3f}", f"{small / plan.bytes:.1%}"
        )
    table.add_section()
    table.add_row("total", f"{plan.bytes:,}", f"{plan.bytes / 2**30:.3f}", "100.0%", style="bold")
    console.print(table)
    others = ", ".join(f"{name} {n / 2**30:.2f}" for name, n in grouped(plan.moments).items())
    console.print(f"the peak is reached in: {plan.moment}. Peaks by moment, GiB: {others}", soft_wrap=True)
    what = "bytes of tensors; Python, torch and the compiler come on top"
    if device == "cuda":
        what = (
            "bytes on the device, in blocks of 512; CUDA was not measured, and 500 MiB for its context are assumed. "
            "Checkpoints are written from a copy in host memory, of weights and optimizer state"
        )
    console.print(f"{device}: {what}", soft_wrap=True)


def grouped(moments: Mapping[str, int]) -> dict[str, int]:
    """Peaks with all blocks taken together, largest first."""
    most: dict[str, int] = {}
    for name, n in moments.items():
        short = re.sub(r" \d+$", "s", name)
        most[short] = max(most.get(short, 0), n)
    return dict(sorted(most.items(), key=lambda item: -item[1]))


def gib(n: int) -> str:
    """In GiB, or where that would be 0.00, in MiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 // 10 else f"{n / 2**20:.2f} MiB"


def plain(plan: "Plan") -> dict[str, Any]:
    """As JSON has it; bytes."""
    return plan._asdict()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
