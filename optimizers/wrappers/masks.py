"""OMGD and LISA over the layers of a model, as `torch_optim` takes them: what to make of an optimizer.

torch_optim.AdamW(model, wrap=Masks(active=2, period=100))                                        OMGD
torch_optim.AdamW(model, wrap=Masks(active=2, period=20, replacement=True, scale_mode="none"))    LISA
"""

from dataclasses import dataclass

from ..contract import Optimizer
from ..random import Key
from ..state import Params
from .omgd import ScaleMode, omgd
from .traversal import layers, traversal


@dataclass(frozen=True)
class Masks:
    """`active` layers train at a time, for `period` steps; what is in no layer always trains. State of what leaves is
    freed. `pattern` finds a layer's index in a name; see `omgd` for `scale_mode` and `turn_warmup`, `traversal` for
    `replacement`."""

    active: int
    period: int
    pattern: str = r"\blayers\.(\d+)\."
    replacement: bool = False
    scale_mode: ScaleMode = "grad"
    turn_warmup: int = 0

    def __call__(self, base: Optimizer, params: Params, key: Key) -> Optimizer:
        """`base` under these masks. Raises UsageError as `layers`, `traversal` and `omgd` do."""
        chosen = layers(params, self.pattern)
        made = traversal(chosen, key, active=self.active, period=self.period, replacement=self.replacement)
        return omgd(base, params, made, self.scale_mode, turn_warmup=self.turn_warmup)
