"""Training steps: this engine, the usual way, and loops that one makes by hand."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.memory import counted_peak
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from models.llama import Llama, LlamaConfig
from optimizers.contract import Group, Optimizer
from optimizers.partition import partition
from optimizers.random import fold
from optimizers.rules.adamw import adamw
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

from .byhand import by_hand
from .timing import Sides, ratio, report, timed

SHOWN = {"ms": "ms", "time ratio": "time", "extra peak MB": "extra MB", "peak ratio": "peak"}
NOTES = (
    "time, peak: over the first row's; extra MB: peak above weights and optimizer state.",
    "Optimizers in backward allow neither accumulation nor clipping by the global norm.",
)


@dataclass(frozen=True)
class StepBench:
    """One training step of a LLaMA: time, and peak memory above weights and optimizer state (allocations counted)."""

    hidden: int = 512
    """Hidden size; the default model has 20 M parameters."""
    layers: int = 6
    vocabulary: int = 1024
    batch: int = 8
    sequence: int = 256
    active: int = 2
    """OMGD: layers that train."""
    rank: int = 128
    """RSO: rank of the subspaces of attention and MLP."""
    rounds: int = 7
    """Timed rounds; every side runs once a round, and the medians of the ratios within rounds are printed."""
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"
    """CPU time, at one thread, is what to read where other programs run on the machine."""
    json: Path | None = None
    """Also write the figures here."""


def bench_step(config: StepBench) -> None:
    """AdamW in segments against the usual way and loops made by hand; OMGD and RSO over AdamW in segments."""
    shape = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.hidden * 43 // 16,
        num_hidden_layers=config.layers,
        num_attention_heads=8,
        max_position_embeddings=config.sequence,
    )
    ids = torch.randint(0, config.vocabulary, (config.batch, config.sequence + 1))
    batch = {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    base = "torch.compile(model), fused AdamW"
    sides: Sides = {base: usual(Llama(shape), batch)}
    for how, in_backward in (("fused AdamW", False), ("AdamW in backward", True)):
        sides[f"compiled blocks, checkpoint, {how}"] = by_hand(Llama(shape), batch, in_backward)
    for recompute in (False, True):
        sides["segments" + ", recompute" * recompute] = ours(Llama(shape), batch, recompute)
    masked = functools.partial(few_layers, active=config.active)
    sides[f"segments, OMGD {config.active} of {config.layers}"] = ours(Llama(shape), batch, wrap=masked)
    for form in ("merged", "products"):
        wrap = functools.partial(subspaces, rank=config.rank, form=form)
        sides[f"segments, RSO {form}"] = ours(Llama(shape), batch, wrap=wrap)
    seconds = timed(sides, config.rounds, time.process_time if config.clock == "cpu" else time.perf_counter)
    peaks = {name: counted_peak(run) for name, run in sides.items()}
    rows: list[dict[str, object]] = [
        {
            "side": name,
            "ms": statistics.median(seconds[name]) * 1e3,
            "time ratio": ratio(seconds, name, base),
            "over segments": ratio(seconds, name, "segments"),
            "extra peak MB": peaks[name] / 1e6,
            "peak ratio": peaks[name] / peaks[base],
            "peak over segments": peaks[name] / peaks["segments"],
        }
        for name in sides
    ]
    count = sum(p.numel() for p in Llama(shape).parameters())
    title = f"{count / 1e6:.1f} M parameters, {config.batch * config.sequence} tokens, fp32"
    report(title, rows, config, SHOWN, NOTES)


def usual(model: Llama, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step as most people run it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = torch.compile(model)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(forward(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()).backward()
        optimizer.step()

    return run


Wrap = Callable[[Optimizer, Llama], Optimizer]


def ours(
    model: Llama, batch: dict[str, Tensor], recompute: bool = False, wrap: Wrap = lambda base, model: base
) -> Callable[[], object]:
    """The same step by the engine, under AdamW or what `wrap` makes of it."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = wrap(partition(params, [Group("adamw", adamw(), ("",), 1e-3, 0.01)]), model)
    step = Step(cut(model), params, optimizer, optimizer.init(params), recompute=recompute)
    hypers = {"adamw": {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.01)}}
    return lambda: step([batch], hypers, 1)


def few_layers(base: Optimizer, model: Llama, active: int) -> Optimizer:
    """OMGD: so many layers train, the others are frozen."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    return omgd(base, params, traversal(layers(params), fold(0, "bench"), active=active, period=1000))


def subspaces(base: Optimizer, model: Llama, rank: int, form: str) -> Optimizer:
    """RSO on attention and MLP."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    names = [name for name in params if "_proj" in name]
    attach(model, names, rank, form)
    return rso(base, params, names, rank, form=form)
