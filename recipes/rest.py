"""Who trains what the rule of a run does not: embedding, head, norms and biases.

Of a small model these hold most of the state, where AdamW trains them: see `docs/memory.md`.
"""

import re
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from optimizers.contract import Group, Params, Rule
from optimizers.routing import EMBEDDING, HEAD
from optimizers.rules.adamw import adamw
from optimizers.rules.scale import scale
from optimizers.rules.snsm import adam_sn

Rest = Literal["adamw", "adam_sn", "scale", "same"]
ROWS = "rows, not a map"


class Rates(Protocol):
    """What a recipe's config says of them."""

    @property
    def rest(self) -> Rest: ...
    @property
    def rest_lr(self) -> float | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...

    vectors: ClassVar[str]


def rest_for(config: Rates, params: Params, rule: Rule, taken: Sequence[str], eps: float = 1e-8) -> list[Group]:
    """Groups for what is left by the patterns in `taken`, which `rule` trains: at a rate of their own where asked.

    Vectors, and what is neither vector nor matrix, are AdamW's always. SCALE has its momentum on the head alone, which
    is the embedding where the two are tied.
    """
    left = [name for name in params if not any(re.search(pattern, name) for pattern in taken)]
    lr, decay, usual = config.lr if config.rest_lr is None else config.rest_lr, config.weight_decay, adamw(eps=eps)
    norms = Group("adamw-norms", usual, (config.vectors,), lr, 0.0, "norms and biases: vectors, never decayed")
    others = [name for name in left if not re.search(config.vectors, name)]
    matrices = [name for name in others if params[name].ndim == 2] if config.rest != "adamw" else []
    rows = [name for name in matrices if EMBEDDING.search(name)]
    if config.rest == "scale":
        tied = not any(HEAD.search(name) for name in params)
        head = [name for name in matrices if name not in rows or tied]
        tables = [name for name in rows if not tied]
        made = [
            ("scale-embedding", scale(each="column"), tables, f"embedding: {ROWS}; by column"),
            ("scale-head", scale(momentum=0.9), head, "head: the one with momentum"),
        ]
    else:
        own = adam_sn() if config.rest == "adam_sn" else rule
        made = [(f"{own.name}-rest", own, matrices, f"embedding and head: {ROWS}")]
    groups = [Group(name, own, _only(names), lr, decay, why) for name, own, names, why in made if names]
    last = Group("adamw-rest", usual, ("",), lr, decay, f"embedding and head: {ROWS}")
    there = [norms] if len(others) < len(left) else []
    return [*there, *groups, *([last] if len(matrices) < len(others) else [])]


def _only(names: Sequence[str]) -> tuple[str]:
    return (f"^(?:{'|'.join(map(re.escape, names))})$",)
