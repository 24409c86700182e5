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
    _name_the_instruction_set()
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(function, fullgraph=True, dynamic=False, **apart)  # type: ignore[no-any-return, call-overload]


def _name_the_instruction_set() -> None:
    """Put the CPU's instruction set into the key of torch's caches of compiled code, which lack it.

    Code of one set is found again under another, where it does not compile or reads out of bounds: after
    ATEN_CPU_CAPABILITY was changed, or where machines share a home.
    """
    used = f"cpu:{torch.backends.cpu.get_cpu_capability()}"
    config = torch.compiler.config
    tag = getattr(config, "cache_key_tag", used)  # a torch without it has to do without
    if used not in (tag or ""):
        config.cache_key_tag = f"{tag or ''} {used}".strip()


def can_compile(device: torch.device) -> str | None:
    """None, or why torch.compile cannot work here."""
    if sys.platform == "win32" and device.type == "cpu" and not shutil.which("cl"):
        return "no C++ compiler found (cl)"
    if device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
        return "no C++ compiler found (g++ or clang++)"
    return None
