"""Measurements as ratios within one run: the machine's mood cancels, so the numbers can be compared.

python -m tools.bench step      training steps: this engine against torch.compile(model) + fused AdamW; OMGD and RSO
python -m tools.bench update    optimizer updates alone, over torch.optim.AdamW(foreach=True); SUMO's over torch Muon's
python -m tools.bench polar     exact polar factors of moments: time over Newton-Schulz's five steps, and errors
python -m tools.bench refresh   rebuilding subspace bases: the randomized range finder against the exact SVD
python -m tools.bench stagger   the slowest training step against the median, bases rebuilt in turn and all at once
"""

import functools
import itertools
import json
import math
import statistics
import sys
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

from engine.command import typed
from engine.compile import compiled
from engine.data import Batches, Tokens
from engine.data.prepare import Request, cached
from engine.kernel import Kernel, make_kernel
from engine.memory import counted_peak
from engine.output import printable
from engine.paths import writable
from engine.segments import cut
from engine.step import Step
from models.layers import attach
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Rule, UsageError, state_bytes
from optimizers.linalg import project, range_basis, svd_basis
from optimizers.linalg.polar import METHODS, by_svd, polar
from optimizers.partition import partition
from optimizers.random import fold
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import adam_sn, adam_snsm, rmsprop_sn, snsm
from optimizers.rules.sumo import sumo
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

Sides = dict[str, Callable[[], object]]
LINEAR = ", Linear weights only"


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


@dataclass(frozen=True)
class UpdateBench:
    """Updates of a LLaMA preset's parameters with fixed gradients: process CPU time."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class PolarBench:
    """Polar factors of r x n matrices with log-spaced singular values: process CPU time."""

    ranks: tuple[int, ...] = (32, 128)
    lengths: tuple[int, ...] = (1024, 4096)
    condition: float = 100.0
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class RefreshBench:
    """Bases of every Linear weight of a LLaMA preset from real gradients: CPU time, and gradient energy captured."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    training: int = 20
    """AdamW steps before the gradients are taken."""
    rounds: int = 3
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


@dataclass(frozen=True)
class StaggerBench:
    """Training steps of the demo model with a subspace rule over one gap: CPU time of each step."""

    rule: Literal["snsm", "sumo"] = "snsm"
    rank: int = 48
    gap: int = 200
    batch: int = 8
    threads: int = 2
    json: Path | None = None
    """Also write the figures here."""


AnyBench = StepBench | UpdateBench | PolarBench | RefreshBench | StaggerBench


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


def report(title: str, rows: list[dict[str, object]], config: AnyBench) -> None:
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
        config.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def bench_step(config: StepBench) -> None:
    """AdamW in segments against the usual way; OMGD and RSO over AdamW against AdamW in segments."""
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


def bench_update(config: UpdateBench) -> None:
    """Every rule as its recipe runs it, bases fixed."""
    shapes = {n: p.shape for n, p in meta(PRESETS[config.model]).named_parameters()}
    params = {n: torch.randn(s) * 0.02 for n, s in shapes.items()}
    grads = {n: torch.randn(s) * 0.01 for n, s in shapes.items()}
    base = "torch AdamW(foreach)"
    sides: Sides = {f"torch AdamW({how})": library(params, grads, how) for how in ("foreach", "fused")}
    sizes: dict[str, int] = {}
    rmsprop = snsm(name="rmsprop", numerator="gradient", second="coordinate", betas=(0.0, 0.999), correct_bias=False)
    rules = {
        "adamw": (adamw(), adamw()),
        "sgd": (sgd(), sgd()),
        "muon": (muon(), adamw()),
        f"galore r={config.rank}": (galore(config.rank), adamw()),
        "adam_sn": (adam_sn(), adamw()),
        "rmsprop_sn": (rmsprop_sn(), rmsprop),
        f"adam_snsm svd r={config.rank}": (adam_snsm(config.rank), adamw()),
        f"adam_snsm topk r={config.rank}": (adam_snsm(config.rank, proj_type="topk"), adamw()),
        f"sumo r={config.rank}": (sumo(config.rank), adamw()),
    }
    for name, (rule, rest) in rules.items():
        sides[name], sizes[name] = updating(rule, rest, params, grads)
    weights = {n: p for n, p in params.items() if linear(n)}
    numbers, theirs = sum(p.numel() for p in weights.values()), f"torch Muon{LINEAR}"
    sides[theirs], sizes[theirs] = library(weights, grads, "muon"), numbers * 4
    for name in ("muon", f"sumo r={config.rank}"):
        sides[name + LINEAR], sizes[name + LINEAR] = updating(rules[name][0], adamw(), weights, grads)
    seconds = timed(sides, config.rounds, time.process_time)
    rows: list[dict[str, object]] = [
        {
            "side": name,
            "CPU ms": statistics.median(seconds[name]) * 1e3,
            "ratio": ratio(seconds, name, base),
            "over torch Muon": ratio(seconds, name, theirs) if name.endswith(LINEAR) else "",
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
    """torch.optim.AdamW, or torch.optim.Muon, on copies of the parameters."""
    copies = [p.clone() for p in params.values()]
    for copy, name in zip(copies, params, strict=True):
        copy.grad = grads[name]
    if how == "muon":
        return torch.optim.Muon(copies, adjust_lr_fn="match_rms_adamw").step
    return torch.optim.AdamW(copies, foreach=how == "foreach", fused=how == "fused").step


def updating(
    rule: Rule, rest: Rule, params: dict[str, Tensor], grads: dict[str, Tensor]
) -> tuple[Callable[[], object], int]:
    """The compiled kernels of `rule` on Linear weights and `rest` elsewhere, a layer at a time as the engine runs them;
    and the bytes of their state."""
    layers: dict[str, list[str]] = {}
    for name in params:
        layers.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    calls, total = [], 0
    kernels: dict[object, Kernel] = {}
    hyper = {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.01)}
    for names in layers.values():
        rules = [rule if linear(n) else rest for n in names]
        own = [params[n].clone() for n in names]
        slots = [r.init(p) for r, p in zip(rules, own, strict=True)]
        for r, name, s in zip(rules, names, slots, strict=True):
            if r.refresh:
                s.update(r.refresh(grads[name], s, fold(0, name))[0])
        total += sum(map(state_bytes, slots))
        kind = tuple(rules), tuple(p.shape for p in own)
        kernel = kernels.setdefault(kind, compiled(make_kernel(rules)))
        calls.append((kernel, [grads[n] for n in names], slots, own, [hyper] * len(names)))
    bound = torch.tensor(1.0)

    def run() -> None:
        for kernel, g, s, p, h in calls:
            kernel(g, s, p, h, bound, None)

    return run, total


def linear(name: str) -> bool:
    """Is this the weight of a Linear layer?"""
    return "_proj" in name or "lm_head" in name


def bench_polar(config: PolarBench) -> None:
    """All methods on the same matrices; the condition number is that before rounding to float32."""
    rows: list[dict[str, object]] = []
    for r, n in itertools.product(config.ranks, config.lengths):
        u, v = (torch.linalg.qr(torch.randn(size, r, dtype=torch.float64))[0] for size in (r, n))
        x = (u * torch.logspace(0, -math.log10(config.condition), r, dtype=torch.float64) @ v.T).float()
        true, eye = by_svd(x.double()), torch.eye(r, dtype=torch.float64)
        sides: Sides = {method: functools.partial(polar, x, method) for method in METHODS}
        seconds = timed(sides, config.rounds, time.process_time)
        for method in METHODS:
            o = polar(x, method).double()
            rows.append(
                {
                    "side": f"{r} x {n} {method}",
                    "CPU ms": statistics.median(seconds[method]) * 1e3,
                    "ratio": ratio(seconds, method, "newton_schulz"),
                    "|OO'-I|/sqrt(r)": float((o @ o.T - eye).norm()) / math.sqrt(r),
                    "|O-UV'|/sqrt(r)": float((o - true).norm()) / math.sqrt(r),
                }
            )
    report(f"condition number {config.condition:g}, fp32, {config.threads} thread(s)", rows, config)


def bench_refresh(config: RefreshBench) -> None:
    """All bases of a model, by both methods."""
    grads = [g for name, g in gradients(config).items() if linear(name)]
    made: dict[str, list[Tensor]] = {}

    def by_svd() -> None:
        made["exact SVD"] = [svd_basis(g, config.rank) for g in grads]

    def by_range() -> None:
        made["range finder"] = [range_basis(g, config.rank, fold(0, i)) for i, g in enumerate(grads)]

    sides: Sides = {"exact SVD": by_svd, "range finder": by_range}
    seconds = timed(sides, config.rounds, time.process_time)
    held = {n: [float(project(g, q).square().sum()) for g, q in zip(grads, qs, strict=True)] for n, qs in made.items()}
    rows: list[dict[str, object]] = []
    for name in sides:
        shares = [a / b for a, b in zip(held[name], held["exact SVD"], strict=True)]
        whole = sum(held[name]) / sum(float(g.square().sum()) for g in grads)
        rows.append(
            {
                "side": name,
                "CPU ms": statistics.median(seconds[name]) * 1e3,
                "ratio": ratio(seconds, name, "exact SVD"),
                "energy of G": whole,
                "over exact, least": min(shares),
                "over exact, mean": statistics.mean(shares),
            }
        )
    report(f"{len(grads)} bases of LLaMA-{config.model}, rank {config.rank}, {config.threads} thread(s)", rows, config)


def gradients(config: RefreshBench) -> dict[str, Tensor]:
    """Gradients of the preset on the standard library's sources, after some training."""
    data = Batches(Tokens(cached(Path("runs/.data"), Request())), 256)
    model = Llama(PRESETS[config.model])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(config.training + 1):
        model.zero_grad()
        batch = data.batch(4 * i, 4)
        cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()).backward()
        if i < config.training:
            optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bench_stagger(config: StaggerBench) -> None:
    """Both ways, over the steps of one gap that follow the first refresh."""
    data = Batches(Tokens(cached(Path("runs/.data"), Request())), 256)
    leading = functools.partial(sumo, basis="range")  # the bases that take longest
    make: Callable[[int, int], Rule] = snsm if config.rule == "snsm" else leading
    rows: list[dict[str, object]] = []
    for staggered in (True, False):
        model = Llama(PRESETS["demo"])
        params: dict[str, Tensor] = dict(model.named_parameters())
        groups = [
            Group(config.rule, make(config.rank, config.gap), ("_proj", "lm_head"), 0.01),
            Group("adamw", adamw(), ("",), 1e-3),
        ]
        optimizer = partition(params, groups, staggered)
        step = Step(cut(model), params, optimizer, optimizer.init(params))
        hypers = {g.name: {"lr": torch.tensor(g.lr), "weight_decay": torch.tensor(0.0)} for g in groups}
        seconds = []
        for i in range(config.gap + 3):
            batch = data.batch(i * config.batch, config.batch)
            start = time.process_time()
            step([batch], hypers, i)
            seconds.append(time.process_time() - start)
        seconds = seconds[3:]
        middle, slowest = statistics.median(seconds), max(seconds)
        plain = sorted(s for i, s in enumerate(seconds, 3) if not optimizer.due(i))
        name = "staggered" if staggered else "all at once"
        rows.append(
            {
                "side": name,
                "median ms": middle * 1e3,
                "slowest ms": slowest * 1e3,
                "ratio": slowest / middle,
                "slowest without refresh / median": plain[-1] / middle,
            }
        )
    report(f"{config.rule} rank {config.rank}, gap {config.gap}, demo model, {config.batch * 256} tokens", rows, config)


Bench = (
    Annotated[StepBench, tyro.conf.subcommand("step")]
    | Annotated[UpdateBench, tyro.conf.subcommand("update")]
    | Annotated[PolarBench, tyro.conf.subcommand("polar")]
    | Annotated[RefreshBench, tyro.conf.subcommand("refresh")]
    | Annotated[StaggerBench, tyro.conf.subcommand("stagger")]
)


def main(config: AnyBench) -> None:
    """Run one benchmark."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    if isinstance(config, StepBench):
        bench_step(config)
    elif isinstance(config, UpdateBench):
        bench_update(config)
    elif isinstance(config, PolarBench):
        bench_polar(config)
    elif isinstance(config, RefreshBench):
        bench_refresh(config)
    else:
        bench_stagger(config)


def asked(config: Bench) -> int:
    """From the command line; returns the exit code."""
    try:
        if config.json:
            writable(config.json, "--json")
        main(config)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    printable()
    raise SystemExit(asked(tyro.cli(Bench, prog=typed(), description=__doc__)))
