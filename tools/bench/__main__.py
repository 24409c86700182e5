"""Measurements as ratios within one run: the machine's mood cancels, so the numbers can be compared.

python -m tools.bench step      training steps: this engine, the usual way, and loops made by hand with equal switches
python -m tools.bench update    optimizer updates alone, over torch.optim.AdamW(foreach=True), other libraries' too
python -m tools.bench polar     exact polar factors of moments: time over Newton-Schulz's five steps, and errors
python -m tools.bench refresh   rebuilding subspace bases: the randomized range finder against the exact SVD
python -m tools.bench stagger   the slowest training step against the median, bases rebuilt in turn and all at once
python -m tools.bench gpu       on CUDA: correctness, waits, speed, peaks, saving, resuming (--help has its flags)
python -m tools.bench ends      starting, resuming and swapping: counted peaks over what training holds
"""

import sys

if sys.argv[1:2] == ["gpu"]:  # before what a GPU's Python may lack is imported
    from .gpu.command import main as gpu

    raise SystemExit(gpu(sys.argv[2:]))

from typing import Annotated

import torch
import tyro

from engine.terminal.flags import ask
from engine.terminal.output import printable
from engine.terminal.paths import writable
from optimizers.contract import UsageError

from .ends import EndsBench, bench_ends
from .polar import PolarBench, bench_polar
from .refresh import RefreshBench, bench_refresh
from .stagger import StaggerBench, bench_stagger
from .step import StepBench, bench_step
from .update import UpdateBench, bench_update

Bench = (
    Annotated[StepBench, tyro.conf.subcommand("step")]
    | Annotated[UpdateBench, tyro.conf.subcommand("update")]
    | Annotated[PolarBench, tyro.conf.subcommand("polar")]
    | Annotated[RefreshBench, tyro.conf.subcommand("refresh")]
    | Annotated[StaggerBench, tyro.conf.subcommand("stagger")]
    | Annotated[EndsBench, tyro.conf.subcommand("ends")]
)


AnyBench = StepBench | UpdateBench | PolarBench | RefreshBench | StaggerBench | EndsBench


def main(config: AnyBench) -> int:
    """Run one benchmark; returns the exit code."""
    try:
        if config.json:
            writable(config.json, "--json")
        measure(config)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def measure(config: AnyBench) -> None:
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    match config:
        case StepBench():
            bench_step(config)
        case UpdateBench():
            bench_update(config)
        case PolarBench():
            bench_polar(config)
        case RefreshBench():
            bench_refresh(config)
        case StaggerBench():
            bench_stagger(config)
        case EndsBench():
            bench_ends(config)


if __name__ == "__main__":
    printable()
    try:
        asked_for = ask(lambda prog: tyro.cli(Bench, prog=prog, description=__doc__))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(main(asked_for))
