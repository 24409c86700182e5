"""Optimizer updates alone, every rule as its recipe runs it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.compile import compiled
from optimizers.contract import Rule, state_bytes
from optimizers.kernel import Kernel, make_kernel
from optimizers.random import fold
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import adam_sn, adam_snsm, rmsprop_sn, snsm
from optimizers.rules.sumo import sumo

from .timing import Sides, ratio, report, timed

LINEAR = ", Linear weights only"


SHOWN = {"CPU ms": "CPU ms", "ratio": "ratio", "over torch Muon": "to Muon", "state MB": "state MB"}
NOTES = (
    "ratio: over torch AdamW(foreach)'s time; to Muon: over torch Muon's, where both move the Linear weights only.",
)


@dataclass(frozen=True)
class UpdateBench:
    """Updates of a LLaMA preset's parameters with fixed gradients: process CPU time."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


def bench_update(config: UpdateBench) -> None:
    """Every rule as its recipe runs it, bases fixed."""
    shapes = {n: p.shape for n, p in meta(PRESETS[config.model]).named_parameters()}
    params = {n: torch.randn(s) * 0.02 for n, s in shapes.items()}
    grads = {n: torch.randn(s) * 0.01 for n, s in shapes.items()}
    base = "torch AdamW(foreach)"
    sides: Sides = {f"torch AdamW({how})": library(params, grads, how) for how in ("foreach", "fused")}
    sizes: dict[str, int] = {}
    rmsprop = snsm(numerator="gradient", second="coordinate", betas=(0.0, 0.999), correct_bias=False)
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
    title = f"LLaMA-{config.model} parameters, fp32, {config.threads} thread(s)"
    report(title, rows, config, SHOWN, NOTES)


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
