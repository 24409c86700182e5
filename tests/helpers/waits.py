"""What a step asks the host for, counted on the CPU: reads of values, and tensors made where no model is."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optimizers import device
from optimizers.linalg import polar
from optimizers.rules import sumo

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")  # their answer or size


class Waits(TorchDispatchMode):
    """Counts by operator what would wait for a device. The default device is another one while it is on: so a tensor
    that is made without naming the model's device is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        elsewhere = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_meta]
        if name in READS or name == "lift_fresh" or boolean or elsewhere:
            self.found[name] += 1
        return out


class Lists(TorchFunctionMode):
    """Counts calls that read a whole tensor, which on the CPU go by no operator."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__array__"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is asked in here, by the ways that code takes on a device."""
    with monkeypatch.context() as patched:
        for module in (device, polar, sumo):
            patched.setattr(module, "free_to_read", lambda x: False)
        with torch.device("meta"), Waits() as mode, Lists(mode.found):
            yield mode.found
