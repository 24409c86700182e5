"""What is measured: models of one size under each method, by this engine and by torch's own loop."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine.step.segments import cut
from engine.step.step import Step
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Rule
from optimizers.partition import partition
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw

from ..byhand import by_hand
from ..step import few_layers, subspaces

TOY = LlamaConfig(257, 32, 48, 2, 2, max_position_embeddings=32)
SIZES: Mapping[str, LlamaConfig] = {**PRESETS, "toy": TOY}
METHODS = ("adamw", "sumo", "snsm", "omgd", "rso")  # a baseline, and the four papers
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16 products a second, as published
LR = 1e-3


def bare(size: str, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """A model without memory."""
    with torch.device("meta"):
        made = Llama(SIZES[size])
    return made.to(dtype)


def model(size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """Drawn where it trains: the host would take minutes for the large ones."""
    made = bare(size, dtype)
    made.allocate(device)
    with torch.no_grad():
        for p in made.parameters():
            nn.init.ones_(p) if p.ndim == 1 else nn.init.normal_(p, std=0.02)
    return made


def batch(size: str, device: torch.device, tokens: int) -> dict[str, Tensor]:
    """Random tokens, in rows of at most 1,024."""
    shape = SIZES[size]
    length = min(1024, shape.max_position_embeddings, tokens)
    ids = torch.randint(0, shape.vocab_size, (max(1, tokens // length), length), device=device)
    return {"input_ids": ids, "targets": ids.roll(-1, 1)}


def rule(name: str, size: str) -> Rule:
    """At a quarter of the hidden size, as the papers have it, where it has a rank."""
    options: dict[str, Any] = {"rank": SIZES[size].hidden_size // 4} if name in ("sumo", "snsm", "galore") else {}
    return RULES[name](**options)


def optimizer(method: str, made: Llama, size: str) -> Optimizer:
    """The method on attention and MLP, AdamW on the rest."""
    params: dict[str, Tensor] = dict(made.named_parameters())
    over = adamw() if method in ("omgd", "rso") else rule(method, size)
    base = partition(params, [Group("matrices", over, (r"_proj\.weight$",), LR), Group("rest", adamw(), ("",), LR)])
    if method == "omgd":
        return few_layers(base, made, max(1, SIZES[size].num_hidden_layers // 4))
    return subspaces(base, made, SIZES[size].hidden_size // 4, "merged") if method == "rso" else base


def step(method: str, size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Step:
    """The engine's step."""
    made = model(size, device, dtype)
    chosen = optimizer(method, made, size)
    params: dict[str, Tensor] = dict(made.named_parameters())
    params = {name: p for name, p in params.items() if not p.is_meta}
    logits = 2**26 if device.type == "cuda" else 2**24
    return Step(cut(made), params, chosen, chosen.init(params), **{"logits": logits, **options})


def ours(method: str, size: str, device: torch.device, tokens: int, **options: Any) -> Callable[[], object]:
    """An ordinary step of the engine, once all bases are there."""
    made, given = step(method, size, device, **options), [batch(size, device, tokens)]
    made(given, step=0)
    count = iter(range(1, 10**9))
    return lambda: made(given, step=next(count))


def usual(size: str, device: torch.device, tokens: int, optimizer: str, recompute: bool) -> Callable[[], object]:
    """`torch.compile` and an optimizer of torch's."""
    made, given = model(size, device), batch(size, device, tokens)
    if recompute:
        return by_hand(made, given, in_backward=False)
    fused = functools.partial(torch.optim.AdamW, lr=LR, fused=True)
    matrices = [p for name, p in made.named_parameters() if "_proj" in name]
    rest = [p for name, p in made.named_parameters() if "_proj" not in name]
    chosen: list[Any] = [torch.optim.Muon(matrices, lr=LR), fused(rest)]
    optimizers = chosen if optimizer == "muon" else [fused(made.parameters())]
    forward = torch.compile(made)

    def run() -> None:
        logits = forward(given["input_ids"])
        cross_entropy(logits.flatten(0, 1).float(), given["targets"].flatten()).backward()
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)

    return run


def flops(size: str, tokens: int) -> float:
    """Of the products of a forward and a backward: 6 a parameter and token, and those of causal attention."""
    shape = SIZES[size]
    matrices = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_hidden_layers * matrices + shape.hidden_size * shape.vocab_size
    length = min(1024, shape.max_position_embeddings, tokens)
    return 6.0 * tokens * (weights + shape.num_hidden_layers * length * shape.hidden_size)


def peak_flops(device: torch.device) -> float | None:
    """What the device is said to do in bf16, where that is known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for key, value in PEAK.items() if key in name), None)
