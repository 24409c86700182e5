"""Loss curves of one run or of several: `python -m tools.plot runs/sumo runs/adamw --out comparison.png`.

Exit codes: 0 done, 1 failure, 2 bad arguments.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from engine.curves import loss_curve
from engine.loop.metrics import FILE, series
from engine.terminal.flags import ask
from engine.terminal.output import printable
from engine.terminal.paths import code, writable
from optimizers.contract import UsageError


@dataclass(frozen=True)
class Plot:
    """Draw the loss of one or several runs from their metrics.jsonl."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path
    """The PNG to write."""
    title: str = ""
    """Heading; empty: the runs' names."""
    ylabel: str = "loss"
    """What the y-axis measures."""
    train: str = "train/loss"
    """Metric drawn as a line; empty draws none."""
    held_out: str = "eval/loss"
    """Metric drawn as points, where a run has it; empty draws none."""
    span: int | None = None
    """Points in the moving average; None: a fiftieth of them, 1: no average."""


def plot(options: Plot) -> Path:
    """Read every run and draw them together."""
    if not options.runs:
        raise UsageError("no run given; name at least one folder that holds a metrics.jsonl")
    writable(options.out, "--out")
    for run in options.runs:
        if not (run / FILE).is_file():
            raise UsageError(f"{run / FILE}: not found; give folders of runs, each with its {FILE}")
    unique = len({run.resolve().name for run in options.runs}) == len(options.runs)
    names = {run.resolve().name if unique else str(run): run for run in options.runs}
    train, held_out = (
        {name: curve for name, run in names.items() if key and (curve := series(run, key))[0]}
        for key in (options.train, options.held_out)
    )
    title = options.title or ", ".join(names)
    return loss_curve(options.out, train, title, options.ylabel, held_out=held_out, span=options.span)


def main(argv: Sequence[str] | None = None) -> int:
    printable()
    try:
        print(plot(ask(lambda prog: tyro.cli(Plot, prog=prog, args=argv, description=__doc__))))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
