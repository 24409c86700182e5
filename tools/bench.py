"""Measurements as ratios within one run: the machine's mood cancels, so the numbers can be compared.

python -m tools.bench step      training steps: this engine against torch.compile(model) + fused AdamW
python -m tools.bench update    optimizer updates alone, over torch.optim.AdamW(foreach=True)
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.compile import compiled
from engine.kernel import Kernel, make_kernel
from engine.memory import counted_peak
from engine.segments import cut
from engine.step import Step
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.adamw import adamw
from optimizers.core import Group, Rule, partition, state_bytes
from optimizers.galore import galore
from optimizers.muon import muon
from optimizers.random import fold
from optimizers.sgd import sgd

Sides = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class StepBench:
    """One training step of a LLaMA: time, and peak memory above weights and optimizer state (allocations counted)."""

    hidden: int = 512
    """Hidden size; the default model has 20 M parameters."""
    layers: int = 6
    vocabulary: int = 1024
    batch: int = 8
    sequence: int = 256
    rounds: int = 7
    """Timed rounds; every side runs once a round, and the medians of the ratios within rounds are printed."""
    threads: int = 2
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class UpdateBench:
    """Updates of a LLaMA preset's parameters with fixed gradients: process CPU time."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


def timed(sides: Sides, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides taking turns, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, run in sides.items():
            start = clock()
            run()
            if i >= 2:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str, base: str) -> float:
    """Median over rounds of side / base."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[base], strict=True))


def report(title: str, rows: list[dict[str, object]], config: StepBench | UpdateBench) -> None:
    """Print the rows as a table, and write them with the configuration where asked."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "side" else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if config.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        content = {"torch": torch.__version__, "config": settings, "rows": rows}
        config.json.write_text(json.dumps(content, indent=1) + "\n")


def bench_step(config: StepBench) -> None:
    """Segments, with and without recompute, against the usual way."""
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
    base = "torch.compile(model) + fused AdamW"
    sides: Sides = {base: usual(Llama(shape), batch)}
    for recompute in (False, True):
        sides["segments" + ", recompute" * recompute] = ours(Llama(shape), batch, recompute)
    seconds = timed(sides, config.rounds, time.perf_counter)
    peaks = {name: counted_peak(run) for name, run in sides.items()}
    rows: list[dict[str, object]] = [
        {
            "side": name,
            "ms": statistics.median(seconds[name]) * 1e3,
            "time ratio": ratio(seconds, name, base),
            "extra peak MB": peaks[name] / 1e6,
            "peak ratio": peaks[name] / peaks[base],
        }
        for name in sides
    ]
    count = sum(p.numel() for p in Llama(shape).parameters())
    report(f"{count / 1e6:.1f} M parameters, {config.batch * config.sequence} tokens, fp32", rows, config)


def usual(model: Llama, batch: dict[str, Tensor]) -> Callable[[], object]:
    """A step as most people run it."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forward = torch.compile(model)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(forward(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()).backward()
        optimizer.step()

    return run


def ours(model: Llama, batch: dict[str, Tensor], recompute: bool) -> Callable[[], object]:
    """The same step by the engine."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = partition(params, [Group("adamw", adamw(), ("",), 1e-3, 0.01)])
    step = Step(cut(model), params, optimizer, optimizer.init(params), recompute=recompute)
    hypers = {"adamw": {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.01)}}
    return lambda: step([batch], hypers, 1)


def bench_update(config: UpdateBench) -> None:
    """Every rule on every parameter of the preset (matrix rules on the matrices, AdamW elsewhere)."""
    shapes = {n: p.shape for n, p in meta(PRESETS[config.model]).named_parameters()}
    params = {n: torch.randn(s) * 0.02 for n, s in shapes.items()}
    grads = {n: torch.randn(s) * 0.01 for n, s in shapes.items()}
    base = "torch AdamW(foreach)"
    sides: Sides = {f"torch AdamW({how})": library(params, grads, how) for how in ("foreach", "fused")}
    sizes: dict[str, int] = {}
    for rule in (adamw(), sgd(), muon(), galore(config.rank)):
        sides[rule.name], sizes[rule.name] = updating(rule, params, grads)
    seconds = timed(sides, config.rounds, time.process_time)
    rows: list[dict[str, object]] = [
        {
            "side": name,
            "CPU ms": statistics.median(seconds[name]) * 1e3,
            "ratio": ratio(seconds, name, base),
            "state MB": sizes.get(name, 2 * sum(s.numel() for s in shapes.values()) * 4) / 1e6,
        }
        for name in sides
    ]
    report(f"LLaMA-{config.model} parameters, fp32, {config.threads} thread(s)", rows, config)


def meta(shape: LlamaConfig) -> Llama:
    """The model without memory."""
    with torch.device("meta"):
        return Llama(shape)


def library(params: dict[str, Tensor], grads: dict[str, Tensor], how: str) -> Callable[[], object]:
    """torch.optim.AdamW on copies of the parameters."""
    copies = [p.clone() for p in params.values()]
    for copy, g in zip(copies, grads.values(), strict=True):
        copy.grad = g
    return torch.optim.AdamW(copies, foreach=how == "foreach", fused=how == "fused").step


def updating(rule: Rule, params: dict[str, Tensor], grads: dict[str, Tensor]) -> tuple[Callable[[], object], int]:
    """The compiled kernels of `rule`, a layer at a time as the engine runs them; and the bytes of its state."""
    matrix = rule.name in ("muon", "galore")
    rest = adamw()
    layers: dict[str, list[str]] = {}
    for name in params:
        layers.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    calls, total = [], 0
    kernels: dict[object, Kernel] = {}
    hyper = {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.01)}
    for names in layers.values():
        rules = [rule if not matrix or "_proj" in n or "lm_head" in n else rest for n in names]
        own = [params[n].clone() for n in names]
        slots = [r.init(p) for r, p in zip(rules, own, strict=True)]
        total += sum(map(state_bytes, slots))
        if rule.refresh:
            for r, n, s in zip(rules, names, slots, strict=True):
                s.update(r.refresh(grads[n], s, fold(0, n))[0] if r.refresh else {})
        kind = tuple(rules), tuple(p.shape for p in own)
        kernel = kernels.setdefault(kind, compiled(make_kernel(rules)))
        calls.append((kernel, [grads[n] for n in names], slots, own, [hyper] * len(names)))
    bound = torch.tensor(1.0)

    def run() -> None:
        for kernel, g, s, p, h in calls:
            kernel(g, s, p, h, bound, None)

    return run, total


Bench = Annotated[StepBench, tyro.conf.subcommand("step")] | Annotated[UpdateBench, tyro.conf.subcommand("update")]


def main(config: StepBench | UpdateBench) -> None:
    """Run one benchmark."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    if isinstance(config, StepBench):
        bench_step(config)
    else:
        bench_update(config)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
