"""Which segments may share a template: those that differ in nothing but the values of parameters and buffers."""

import functools
from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from models.segment import Segment

Seen = dict[tuple[int, int], tuple[Any, Any]]  # pairs compared already, kept alive so that no number is given twice
OWN = ("_parameters", "_buffers", "_modules")  # of a module: given with each call, or looked through


def kinds(segments: Sequence[Segment]) -> tuple[list[str], dict[str, str]]:
    """The kind of each segment, and for those that are kinds of their own what sets them apart from the first one.

    A segment that differs from all before it of its kind is called "block 2", "block 3" and so on.
    """
    found: list[str] = []
    first: dict[str, dict[str, Segment]] = {}
    apart: dict[str, str] = {}
    for segment in segments:
        like = first.setdefault(segment.kind, {})
        why = {name: difference(other, segment) for name, other in like.items()}
        kind = next((name for name, differs in why.items() if differs is None), None)
        if kind is None:
            kind = f"{segment.kind} {len(like) + 1}" if like else segment.kind
            if like:
                apart[kind] = str(next(iter(why.values())))
            like[kind] = segment
        found.append(kind)
    return found, apart


def difference(a: Segment, b: Segment) -> str | None:
    """The first thing, by its path, in which two segments differ beyond the values of parameters and buffers."""
    ignore = {*a.ignore, *b.ignore}
    if a.tokens != b.tokens or a.vocabulary != b.vocabulary:
        return "tokens" if a.tokens != b.tokens else "vocabulary"
    found = _differ(a.call, b.call, "call", {}, ignore) or _differ(a.module, b.module, "module", {}, ignore)
    return found or (None if _ties(a.module) == _ties(b.module) else "tied parameters")


def _ties(module: nn.Module) -> list[str]:
    """Of each name of a parameter or buffer the first name that it has."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [first.setdefault(id(t), name) for name, t in named]


def _differ(a: Any, b: Any, path: str, seen: Seen, ignore: set[str]) -> str | None:
    if a is b or (id(a), id(b)) in seen:
        return None
    seen[id(a), id(b)] = a, b
    if type(a) is not type(b):
        return path
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(a, Tensor):
        return None if _equal(a, b) else path
    if isinstance(a, nn.Module):
        return _modules(a, b, path, seen, ignore)
    if isinstance(a, FunctionType):
        if a.__code__ is not b.__code__:
            return path
        pairs = [("defaults", a.__defaults__, b.__defaults__), ("keywords", a.__kwdefaults__, b.__kwdefaults__)]
        cells = zip(a.__code__.co_freevars, a.__closure__ or (), b.__closure__ or (), strict=True)
        pairs += [(name, one.cell_contents, other.cell_contents) for name, one, other in cells]
    elif isinstance(a, MethodType):
        pairs = [("function", a.__func__, b.__func__), ("self", a.__self__, b.__self__)]
    elif isinstance(a, functools.partial):
        pairs = [("func", a.func, b.func), ("args", a.args, b.args), ("keywords", a.keywords, b.keywords)]
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            return path
        pairs = [(str(key), value, b[key]) for key, value in a.items()]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return path
        pairs = [(str(i), one, other) for i, (one, other) in enumerate(zip(a, b, strict=True))]
    elif _has_own_equality(a):
        return None if _same(a, b) else path
    elif hasattr(a, "__dict__"):
        pairs = [(path, vars(a), vars(b))]
    else:
        return path
    return next((d for name, x, y in pairs if (d := _differ(x, y, f"{path}.{name}", seen, ignore))), None)


def _modules(a: nn.Module, b: nn.Module, path: str, seen: Seen, ignore: set[str]) -> str | None:
    for kind in OWN:
        one, other = vars(a)[kind], vars(b)[kind]
        if {n: v is None for n, v in one.items()} != {n: v is None for n, v in other.items()}:
            return f"{path}.{kind}"
    for name, buffer in a._buffers.items():
        other = b._buffers[name]
        if buffer is not None and other is not None and (buffer.shape, buffer.dtype) != (other.shape, other.dtype):
            return f"{path}.{name}"
    mine, theirs = ({k: v for k, v in vars(m).items() if k not in OWN and k not in ignore} for m in (a, b))
    if mine.keys() != theirs.keys():
        return f"{path}.{min(mine.keys() ^ theirs.keys())}"
    for name, value in mine.items():
        pair = value, theirs[name]
        if "hooks" in name and isinstance(value, dict):  # by the number of the hook, which is never the same
            pair = list(value.values()), list(theirs[name].values())
        if found := _differ(*pair, f"{path}.{name}", seen, ignore):
            return found
    inside = ((name, child, b._modules[name]) for name, child in a._modules.items())
    return next((d for name, x, y in inside if (d := _differ(x, y, f"{path}.{name}", seen, ignore))), None)


def _has_own_equality(a: object) -> bool:
    return bool(type(a).__eq__ != object.__eq__)


def _same(a: Any, b: Any) -> bool:
    """Equal by their own measure; what has none, or is not equal to itself, is equal where it reads the same."""
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:
        return False


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.is_meta:
        return True
    try:
        return torch.equal(a, b)
    except RuntimeError:  # fake tensors have no values to compare
        return True
