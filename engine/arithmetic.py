"""How the process computes: the precision of fp32 products, and whether a run repeats to the bit on CUDA."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from optimizers.contract import UsageError

from .config import RunConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")  # what cuBLAS has to be told before CUDA starts


@contextmanager
def arithmetic(config: RunConfig) -> Iterator[None]:
    """Compute in here as `config` says. Whoever compiles or starts CUDA does so inside.

    Deterministic is: operators that have a deterministic form take it and others raise, cuBLAS has a workspace of its
    own, nothing is chosen by how long it took. Raises UsageError where CUDA runs already without that workspace.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(config.matmul)
    try:
        with _deterministic() if config.deterministic else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    import torch._inductor.config as inductor

    if os.environ.get(WORKSPACE) not in FIXED:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UsageError(
                f"--deterministic: got {WORKSPACE}={os.environ.get(WORKSPACE, '')!r} and CUDA running, expected one of "
                f"{FIXED}; set it before the process starts"
            )
        os.environ[WORKSPACE] = FIXED[0]
    filling: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, timed = filling.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    untimed = {"max_autotune": False, "coordinate_descent_tuning": False}
    untimed |= {"deterministic": True} if hasattr(inductor, "deterministic") else {}
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing here reads memory that it did not write
    torch.backends.cudnn.benchmark = False
    try:
        with inductor.patch(untimed):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        filling.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = timed
