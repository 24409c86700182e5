"""A pytest plugin that makes this CPU another one: every float32 product, sum and factorisation rounds in its own way.

    python -m pytest -p tests.helpers.other_cpu tests/rules/test_snsm.py -m "not compiles"

A comparison that fails under it is closer than float32 determines: it is relative to the wrong thing, or computes
again what it should take from a recorded run. Tests that ask for equal bits of two different computations fail
too, and may. `ROUNDING` is how far a result moves, relative to the sum of |terms| (default 1.2e-7, one
unit of float32).
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = float(os.environ.get("ROUNDING", "1.2e-7"))
A = torch.ops.aten
FACTORS = {A.mm.default: (0, 1), A.bmm.default: (0, 1), A.addmm.default: (1, 2), A.baddbmm.default: (1, 2)}
WHOLE = {A._linalg_svd.default, A._linalg_eigh.default, A.linalg_qr.default}  # errors relative to the largest entry
SUMS = {A.sum.default, A.sum.dim_IntList, A.mean.default, A.mean.dim, A.linalg_vector_norm.default, A._softmax.default}


class OtherCPU(TorchDispatchMode):
    """Adds to each result a rounding error that depends on its bits alone, so that equal calls stay equal."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in FACTORS and _rounds(out):
            a, b = (args[i].abs().double() for i in FACTORS[function])
            return _moved(out, torch.matmul(a, b))
        if function in WHOLE:
            return tuple(_moved(x, x.abs().max()) if _rounds(x) else x for x in out)
        return _moved(out, out.abs()) if function in SUMS and _rounds(out) else out


def _rounds(x: Any) -> bool:
    real = isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.device.type == "cpu"
    return real and x.dtype == torch.float32 and x.numel() > 0


def _moved(x: Tensor, size: Tensor) -> Tensor:
    return (x.double() + ROUNDING * size * torch.sin(x.double() * 987654321.0)).to(x.dtype)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with OtherCPU():
        yield
