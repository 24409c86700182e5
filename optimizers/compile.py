"""One way to call torch.compile: full graphs, static shapes, and a plain error where a compiler is missing."""

import functools
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])
NUMBERS = itertools.count()  # of functions that were given a code object


def compiled(function: F) -> F:
    """`function` compiled on its own: fullgraph, static shapes, its recompiles counted apart from other functions'."""
    _name_the_instruction_set()
    if _isolates():
        return torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[no-any-return, call-overload]
    return torch.compile(_apart(function), fullgraph=True, dynamic=False)  # type: ignore[return-value]


def _isolates() -> bool:
    """Does torch count the recompiles of each compiled function apart? From 2.13 on."""
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


def _apart(function: F) -> F:
    """`function` with a code object of its own. Functions made by one `def` share theirs, and with it the limit of
    entries that an older torch keeps a code object, where one entry more is an error."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(NUMBERS)}")
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)  # type: ignore[return-value]


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
