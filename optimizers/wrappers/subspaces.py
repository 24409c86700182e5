"""RSO as `torch_optim` takes it: the matrices of a model moved in random subspaces, by any rule.

torch_optim.AdamW(model, lr=1e-3, wrap=Subspaces(rank=128, period=200))

A loop of one's own has the whole gradient G of a weight, and dB = G P is made of it: so the state is RSO's, and the
steps are, while gradients and activations are those of plain training. That x P is kept in the place of x takes a model
that follows the subspaces, which the engine has.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..contract import Optimizer, UsageError
from ..random import Key
from ..routing import place
from ..state import Params
from .rso import rso


@dataclass(frozen=True)
class Subspaces:
    """Each matrix ("....weight") that the regular expression `pattern` finds, all that are no embedding and no head
    where there is none, in a random subspace of `rank`, a new one every `period` steps; see `rso` for the others."""

    rank: int
    period: int = 200
    pattern: str = ""
    projection: str = "gaussian"
    share: Sequence[Sequence[str]] = ()
    moments: str = "reset"
    prox: float = 0.0
    warmup: int = 0

    def __call__(self, base: Optimizer, params: Params, key: Key) -> Optimizer:
        """`base` in these subspaces. Raises UsageError where nothing is found, and as `rso` does."""
        weights = {name: p for name, p in params.items() if p.ndim == 2 and name.endswith("weight")}
        if self.pattern:
            found = [name for name in weights if re.search(self.pattern, name)]
        else:
            found = [name for name, p in weights.items() if place(name, p, {}) == "rule"]
        if not found:
            raise UsageError(
                f"Subspaces: pattern {self.pattern!r} finds no matrix to move in a subspace; the names look like "
                f"{list(params)[:3]}"
            )
        return rso(
            base,
            params,
            found,
            self.rank,
            self.period,
            key,
            projection=self.projection,
            share=self.share,
            moments=self.moments,
            prox=self.prox,
            warmup=self.warmup,
        )
