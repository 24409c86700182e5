"""Small models under every optimizer, and what was planned for them."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from engine.planner.plan import Built, Plan, cast, plan
from engine.step.segments import cut
from engine.tasks.config import LanguageConfig
from engine.tasks.language import blank
from models.layers import attach
from models.llama import Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Rule
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.storage.stored import stored
from optimizers.wrappers.norms import norm_masks
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

MATRICES = r"_proj\.weight$"
Params = dict[str, Tensor]
TINY = LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=32)


def plain(rule: Rule) -> Callable[[Llama, Params], Optimizer]:
    groups = [Group("rule", rule, (MATRICES,), 1e-3), Group("rest", adamw(), ("",), 1e-3)]
    return lambda model, params: partition(params, groups)


def masked(model: Llama, params: Params) -> Optimizer:
    masks = traversal(layers(params), Key(1), active=2, period=10)
    return omgd(plain(adamw())(model, params), params, masks)


def by_norm(model: Llama, params: Params) -> Optimizer:
    masks = norm_masks(layers(params), Key(1), active=1, period=10)
    return omgd(plain(adamw())(model, params), params, masks, "none")


def subspaces(model: Llama, params: Params) -> Optimizer:
    names = [name for name in params if name.endswith("_proj.weight")]
    made = rso(plain(adamw())(model, params), params, names, 16, period=10)
    attach(model, names, 16)
    return made


METHODS: dict[str, Callable[[Llama, Params], Optimizer]] = {
    "adamw": plain(adamw()),
    "sgd": plain(sgd(0.9)),
    "muon": plain(muon()),
    "galore": plain(galore(16)),
    "snsm": plain(snsm(16)),
    "sumo": plain(sumo(16)),
    "sumo, tracked": plain(sumo(16, 1, basis="track")),
    "sumo, when it sees too little": plain(sumo(16, refresh_below=1e9)),
    "adamw in bf16": plain(stored(adamw(), "bf16")),
    "adamw in int8": plain(stored(adamw(), "int8")),
    "sumo in int8": plain(stored(sumo(16), "int8", "bf16")),
    "snsm in bf16": plain(stored(snsm(16), "bf16", "bf16")),
    "omgd": masked,
    "omgd, by norm": by_norm,
    "rso": subspaces,
}


def built(
    method: str, shape: LlamaConfig, dtype: torch.dtype = torch.float32, fill: bool = True, sequence: int = 0
) -> Built:
    """Model and optimizer, on whatever tensors are made here: real or fake ones, which need not be filled."""
    with torch.device("meta"):
        model = Llama(shape)
    model.allocate("cpu")
    if fill:
        model.init_weights(0)
    if dtype != torch.float32:
        cast(model, dtype)
    params: Params = dict(model.named_parameters())
    optimizer = METHODS[method](model, params)
    return Built(cut(model), params, optimizer, lambda rows: blank(rows, sequence))


def settings(batch: int, tokens: int, **options) -> LanguageConfig:
    return LanguageConfig(**(dict(micro_batch=batch, sequence=tokens, steps=100) | options))


def precise(config: LanguageConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision.startswith("bf16") else torch.float32


def predicted(method: str, shape: LlamaConfig, config: LanguageConfig, *steps: int) -> Plan:
    gc.collect()  # what other tests left in cycles dies when it likes
    return plan(lambda: built(method, shape, precise(config), False, config.sequence), config, steps=steps)
