"""What it takes to start a run, to resume it, and to take over from another optimizer, over what training holds."""

import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import checkpoint
from engine.loop.trainer import Trainer
from engine.memory import counted_peak
from engine.step.segments import Batch, Segment, cut
from engine.task import Task
from models.llama import Llama
from optimizers.contract import total_bytes
from recipes.build import Run, build
from recipes.registry import parsed, trained_by
from recipes.swap import source

from .timing import Row, report

SHAPE = (
    "--compile off --no-check-memory --sequence 16 --micro-batch 2 --steps 4 --size.hidden-size 64 "
    "--size.intermediate-size 160 --size.num-hidden-layers 24 --size.num-attention-heads 4"
)  # many tensors, each a small part of the whole, as in a large model
OPTIMIZERS = {
    "adamw": "baseline",
    "sgd": "baseline --optimizer sgd",
    "muon": "baseline --optimizer muon",
    "galore": "baseline --optimizer galore --rank 8",
    "lisa": "baseline --optimizer lisa --period 1step",
    "snsm": "snsm demo --rank 8",
    "adam_sn": "snsm demo --method adam_sn",
    "adagrad_sn": "snsm demo --method adagrad_sn",
    "rmsprop_sn": "snsm demo --method rmsprop_sn",
    "adam_sm": "snsm demo --method adam_sm --rank 8",
    "adam_snsm": "snsm demo --method adam_snsm --rank 8",
    "adagrad_snsm": "snsm demo --method adagrad_snsm --rank 8",
    "sgd_sm": "snsm demo --method sgd_sm --rank 8",
    "sumo": "sumo demo --rank 8",
    "sumo, paper": "sumo demo --rank 8 --profile paper",
    "sumo, release": "sumo demo --rank 8 --profile release",
    "rso": "rso demo --rank 8",
    "rso, products": "rso demo --rank 8 --form products --share",
    "rso over snsm": "rso demo --rank 8 --inner snsm --inner-rank 4",
    "omgd": "omgd pretrain --active 6 --period 1step",
    "omgd, keep": "omgd pretrain --active 6 --period 1step --state-policy keep",
    "omgd over snsm, offload": "omgd pretrain --active 6 --period 1step --over snsm --rank 8 --state-policy offload",
    "omgd of coordinates": "omgd pretrain --by coordinates --over sgd --period 1step",
    "snsm, bf16-sr": "snsm demo --rank 8 --precision bf16-sr",
    "adamw, bf16": "baseline --precision bf16",
}


SHOWN = {"held MB": "held MB", "start": "start", "resume": "resume", "from": "from adamw", "to": "to adamw"}
NOTES = ("start, resume, from adamw (a swap), to adamw: the most bytes alive at once over those held afterwards.",)


@dataclass(frozen=True)
class EndsBench:
    """Peaks of start-up, resume and swaps over weights, tables and state, for every optimizer."""

    threads: int = 2
    json: Path | None = None
    """Also write the figures here."""


class End(NamedTuple):
    """Of one end of a run: the most bytes alive at once, and those of weights, tables and state afterwards."""

    peak: int
    held: int


class Nothing(Task):
    """Rows of one token, for a model that is to be made rather than trained."""

    unit, rows = "tokens", 1000

    def __init__(self, model: Llama) -> None:
        self.model: Llama = model

    def segments(self) -> list[Segment]:
        return list(cut(self.model))

    def batch(self, position: int, count: int) -> Batch:
        ids = torch.arange(count * 16).view(count, 16) % 251
        return {"input_ids": ids, "targets": ids}

    def evaluation(self, count: int) -> Iterator[Batch]:
        yield self.batch(0, count)

    def fingerprint(self) -> dict[str, Any]:
        return {"data": "nothing"}

    def model_config(self) -> dict[str, Any]:
        return self.model.config.to_hf()


def built(line: str, shape: str = SHAPE) -> Run:
    """The run of a recipe and its flags, without memory."""
    return build(parsed(shlex.split(f"{line} {shape}"), "bench"), 257)


def measured(make: Callable[[], Trainer]) -> tuple[Trainer, End]:
    """A trainer, and what it took to make it."""
    made: list[Trainer] = []
    peak = counted_peak(lambda: made.append(make()))
    step = made[0].step
    tables = {id(b): b for segment in step.chain.segments for b in segment.module.buffers()}.values()
    fixed = sum(t.nbytes for t in (*step.params.values(), *tables))
    return made[0], End(peak, fixed + total_bytes(step.state))


def started(line: str, out: Path) -> tuple[Trainer, End]:
    """A fresh run."""
    run = built(line)
    return measured(lambda: run.trainer(Nothing(run.model), out, torch.device("cpu")))


def saved(line: str, out: Path, steps: int = 2) -> Path:
    """A checkpoint of a few steps."""
    trainer, _ = started(line, out)
    for _ in range(steps):
        trainer._one_step()
        trainer.done, trainer.position = trainer.done + 1, trainer.position + 2
    return trainer.save_now()


def resumed(line: str, path: Path, swap: bool = False) -> End:
    """A run that goes on from a checkpoint of its own optimizer, or takes over from that of another (`swap`)."""
    run, found = built(line), checkpoint.read(path)
    theirs = source(found, run, trained_by(found)) if swap else None

    def make() -> Trainer:
        trainer = run.trainer(Nothing(run.model), path.parent, torch.device("cpu"), fresh=False)
        trainer.resume(found, theirs)
        return trainer

    return measured(make)[1]


def bench_ends(config: EndsBench) -> None:
    """A row per optimizer."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = {dtype: saved(f"baseline --precision {dtype}", Path(folder) / dtype) for dtype in ("fp32", "bf16")}
        for number, (name, line) in enumerate(OPTIMIZERS.items()):
            path = saved(line, Path(folder) / str(number))
            dtype = "bf16" if "--precision bf16" in line else "fp32"
            ends = {
                "start": started(line, Path(folder) / "fresh")[1],
                "resume": resumed(line, path),
                "from": resumed(line, base[dtype], swap=True),
                "to": resumed(f"baseline --precision {dtype}", path, swap=True),
            }
            megabytes = {f"{end} MB": found.peak / 1e6 for end, found in ends.items()}
            ratios = {end: found.peak / found.held for end, found in ends.items()}
            rows.append({"side": name, "held MB": ends["resume"].held / 1e6, **ratios, **megabytes})
    report("Peak over weights, tables and state", rows, config, SHOWN, NOTES)
