"""Optimizer updates alone, every rule as its recipe runs it."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from models.llama import PRESETS, Llama, LlamaConfig
from optimizers import torch_optim
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
from optimizers.storage.stored import MomentsDtype, stored

from .libraries import Library, Named, held, missing, others, stepping
from .timing import ratio, report, timed

LINEAR = ", Linear weights only"
BASE = "torch AdamW(foreach)"
PLUGGED = ("adamw", "galore", "adam_snsm svd", "sumo")  # rules whose torch.optim class is a side too
SHORT: tuple[MomentsDtype, ...] = ("bf16", "int8")
KEPT = ("adamw", "muon", "adam_snsm svd", "sumo")  # rules whose state is also kept in fewer bytes

SHOWN = {"CPU ms": "CPU ms", "ratio": "ratio", "over ours": "to ours", "state MB": "state MB"}
NOTES = (
    "ratio: over torch AdamW(foreach)'s time; to ours: over the time of the engine's update by the same rule.",
    "torch.optim: the class of a rule for loops of one's own, compiled, whose step also checks its groups.",
)


@dataclass(frozen=True)
class UpdateBench:
    """Updates of a LLaMA preset's parameters with fixed gradients: process CPU time."""

    model: Literal["demo", "60m", "130m"] = "60m"
    rank: int = 128
    against: tuple[Library, ...] = ("torch",)
    """Libraries whose optimizers take part, in turn with the others; one that is not installed is said to be missing.
    Of torch AdamW(foreach), over which ratios are, is always there."""
    only: str = ""
    """A regular expression: the sides that take part, by its being found in their names."""
    rounds: int = 9
    threads: int = 1
    json: Path | None = None
    """Also write the figures here."""


class Side(NamedTuple):
    """What is timed, what its state takes, and the side of ours that does the same."""

    run: Callable[[], object]
    state: Callable[[], int]
    like: str = ""


def bench_update(config: UpdateBench) -> None:
    """Every rule as its recipe runs it, bases fixed; all sides move the same weights by the same gradients."""
    shapes = {n: p.shape for n, p in meta(PRESETS[config.model]).named_parameters()}
    params: Named = {n: torch.nn.Parameter(torch.randn(s) * 0.02) for n, s in shapes.items()}
    grads = {n: torch.randn(s) * 0.01 for n, s in shapes.items()}
    sides = ours(config.rank, params, grads)
    notes = list(NOTES)
    for library in dict.fromkeys(config.against):
        if line := missing(library):
            notes.append(line)
        else:
            sides |= theirs(library, config.rank, params, grads)
    if BASE not in sides:
        sides[BASE] = theirs("torch", config.rank, params, grads)[BASE]
    sides = {name: side for name, side in sides.items() if name == BASE or re.search(config.only, name)}
    seconds = timed({name: side.run for name, side in sides.items()}, config.rounds, time.process_time)
    rows: list[dict[str, object]] = [
        {
            "side": name,
            "CPU ms": statistics.median(seconds[name]) * 1e3,
            "ratio": ratio(seconds, name, BASE),
            "over ours": ratio(seconds, name, side.like) if side.like in sides else "",
            "state MB": side.state() / 1e6,
        }
        for name, side in sides.items()
    ]
    title = f"LLaMA-{config.model} parameters, fp32, {config.threads} thread(s)"
    report(title, rows, config, SHOWN, notes)


def ours(rank: int, params: Named, grads: Named) -> dict[str, Side]:
    """The rules here as the engine runs them, and some as torch.optim classes."""
    rmsprop = snsm(numerator="gradient", second="coordinate", betas=(0.0, 0.999), correct_bias=False)
    rules = {
        "adamw": (adamw(), adamw()),
        "sgd": (sgd(), sgd()),
        "muon": (muon(), adamw()),
        "galore": (galore(rank), adamw()),
        "adam_sn": (adam_sn(), adamw()),
        "rmsprop_sn": (rmsprop_sn(), rmsprop),
        "adam_snsm svd": (adam_snsm(rank), adamw()),
        "adam_snsm topk": (adam_snsm(rank, proj_type="topk"), adamw()),
        "sumo": (sumo(rank), adamw()),
    }
    sides = {name: updating(*pair, params, grads) for name, pair in rules.items()}
    for name in PLUGGED:
        sides[f"{name}, torch.optim"] = plugged(rules[name][0], rank, params, grads)._replace(like=name)
    for name in KEPT:
        for dtype in SHORT:
            rule, rest = (stored(one, dtype, "bf16") for one in rules[name])
            sides[f"{name}, state in {dtype}"] = updating(rule, rest, params, grads)._replace(like=name)
    weights = {n: p for n, p in params.items() if linear(n)}
    for name in ("muon", "sumo"):
        sides[name + LINEAR] = updating(rules[name][0], adamw(), weights, grads)
    return sides


def theirs(library: Library, rank: int, params: Named, grads: Named) -> dict[str, Side]:
    """The optimizers of a library."""
    sides: dict[str, Side] = {}
    for other in others(library, rank, linear):
        named = {n: p for n, p in params.items() if linear(n) or not other.linear_only}
        optimizer, last = other.make(named), LINEAR if other.linear_only else ""
        run = stepping(optimizer, named, grads)
        sides[other.name + last] = Side(run, partial(held, optimizer), other.like + last)
    return sides


def meta(shape: LlamaConfig) -> Llama:
    """The model without memory."""
    with torch.device("meta"):
        return Llama(shape)


def updating(rule: Rule, rest: Rule, params: Named, grads: Named) -> Side:
    """The compiled kernels of `rule` on Linear weights and `rest` elsewhere, a layer at a time as the engine does."""
    layers: dict[str, list[str]] = {}
    for name in params:
        layers.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    calls: list[tuple[Any, ...]] = []
    kernels: dict[object, Kernel] = {}
    hyper = {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.01)}
    for names in layers.values():
        rules = [rule if linear(n) else rest for n in names]
        own = [params[n].detach() for n in names]
        slots = [r.init(p) for r, p in zip(rules, own, strict=True)]
        for r, name, s in zip(rules, names, slots, strict=True):
            if r.refresh:
                s.update(r.refresh(grads[name], s, fold(0, name))[0])
        kind = tuple(rules), tuple(p.shape for p in own)
        kernel = kernels.setdefault(kind, compiled(make_kernel(rules)))
        seeds = torch.arange(len(names), dtype=torch.int32) if any(r.draws for r in rules) else None
        calls.append((kernel, [grads[n] for n in names], slots, own, [hyper] * len(names), seeds))
    bound = torch.tensor(1.0)

    def run() -> None:
        for kernel, g, s, p, h, seeds in calls:
            kernel(g, s, p, h, bound, seeds)

    return Side(run, lambda: sum(state_bytes(slots) for call in calls for slots in call[2]))


def plugged(rule: Rule, rank: int, params: Named, grads: Named) -> Side:
    """The class of a rule for loops of one's own, on the same tensors, bases built in the first step."""
    given: dict[str, Any] = {} if rule.elementwise else {"match": ("_proj", "lm_head"), "rank": rank}
    given |= {"update_proj_gap": 10**6} if rule.gap else {}
    optimizer = torch_optim.optimizer(rule.name)(params.items(), 1e-3, 0.01, compile=True, **given)
    return Side(stepping(optimizer, params, grads), partial(held, optimizer))


def linear(name: str) -> bool:
    """Is this the weight of a Linear layer?"""
    return "_proj" in name or "lm_head" in name
