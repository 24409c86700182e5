"""One way to call torch.compile: full graphs, static shapes, and a plain error where a compiler is missing."""

import inspect
import shutil
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """`function` compiled on its own: fullgraph, static shapes, its recompiles counted apart from other functions'."""
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(function, fullgraph=True, dynamic=False, **apart)  # type: ignore[no-any-return, call-overload]


def can_compile(device: torch.device) -> str | None:
    """None, or why torch.compile cannot work here."""
    if sys.platform == "win32" and device.type == "cpu" and not shutil.which("cl"):
        return "no C++ compiler found (cl)"
    if device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return "no C++ compiler found (g++ or clang++)"
    return None
