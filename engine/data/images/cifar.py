"""CIFAR-10 and CIFAR-100 as their authors publish them for Python: dicts of arrays in pickles.

A pickle is a program. Here it is read and never run: its opcodes build lists, dicts, numbers, texts and arrays of
bytes; a name that it calls is a name, and nothing is imported.
"""

import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimizers.contract import UsageError

from .sets import Held, Split

SIDE, ROW = 32, 3072  # bytes of an image: 32 x 32 of red, of green, of blue


def here(folder: Path) -> bool:
    """Does a folder hold such batches?"""
    return (folder / "data_batch_1").is_file() or all((folder / name).is_file() for name in ("meta", "train", "test"))


def read(folder: Path) -> Split:
    """Both parts; of CIFAR-100 the fine classes. Raises UsageError."""
    ten = (folder / "data_batch_1").is_file()
    names = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    labels, meta = ("labels", "label_names") if ten else ("fine_labels", "fine_label_names")
    classes = _content(folder / ("batches.meta" if ten else "meta")).get(meta)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UsageError(f"{folder}: got no list {meta}, expected the names of the classes; fetch the set again")
    train = [_batch(folder / name, labels) for name in names]
    held_out = _batch(folder / ("test_batch" if ten else "test"), labels)
    whole = Held(*(torch.cat([part[i] for part in train]) for i in (0, 1)))
    return Split(whole, Held(*held_out), tuple(classes))


def _batch(file: Path, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = _content(file)
    raw, targets = found.get("data"), found.get(labels)
    data = _bytes(raw)
    if data is None or not isinstance(targets, list) or not all(type(k) is int for k in targets):
        raise UsageError(f"{file}: got the keys {list(found)[:6]}, expected data, bytes, and {labels}, numbers")
    if len(data) != ROW * len(targets):
        raise UsageError(
            f"{file}: got {len(data):,} bytes of data and {len(targets):,} labels, expected {ROW:,} bytes a label; "
            "fetch it again"
        )
    pixels = np.frombuffer(data, np.uint8).reshape(len(targets), 3, SIDE, SIDE).copy()
    return torch.from_numpy(pixels), torch.tensor(targets)


class _Made:
    """What a pickle would have called a name for."""

    def __init__(self, name: Any, args: Any) -> None:
        self.name, self.args, self.state = name, args, None


def _bytes(made: Any) -> bytes | None:
    """The bytes of an array, or None where it is none of bytes in C order."""
    state = made.state if isinstance(made, _Made) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    kind, fortran, raw = state[2:]
    if fortran or not isinstance(kind, _Made) or not kind.args or kind.args[0] not in ("u1", "uint8", b"u1"):
        return None
    return raw.encode("latin-1") if isinstance(raw, str) else raw if isinstance(raw, bytes) else None


def _content(file: Path) -> dict[Any, Any]:
    """What a pickle holds: a dict. Raises UsageError."""
    if not file.is_file():
        raise UsageError(f"{file}: is not there; fetch the set again, with all of its batches")
    try:
        found = _built(file.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: is no batch of CIFAR, or damaged ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: got a {type(found).__name__}, expected a dict; fetch it again")
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in found.items()}


def _built(data: bytes) -> Any:
    """The data that a pickle's opcodes build. Raises ValueError for opcodes that do anything else."""
    stack, memo, marks = list[Any](), dict[int, Any](), list[int]()
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name == "MARK":
            marks.append(len(stack))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else int(arg)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif name in SIZES or name == "TUPLE":
            first = marks.pop() if name == "TUPLE" else len(stack) - SIZES[name]
            stack[first:] = [tuple(stack[first:])]
        else:
            _combine(name, stack, marks)
    raise ValueError("it has no end")


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "GLOBAL"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _combine(name: str, stack: list[Any], marks: list[int]) -> None:
    """Opcodes that make one value of several."""
    if name in ("REDUCE", "STACK_GLOBAL"):
        args, called = stack.pop(), stack.pop()
        text = name == "REDUCE" and called == "_codecs encode"  # how bytes are written for an older Python
        stack.append(f"{called} {args}" if name == "STACK_GLOBAL" else args[0] if text else _Made(called, args))
    elif name == "BUILD":
        state = stack.pop()
        stack[-1].state = state
    elif name in ("APPEND", "APPENDS"):
        first = marks.pop() if name == "APPENDS" else len(stack) - 1
        stack[first - 1].extend(stack[first:])
        del stack[first:]
    elif name in ("SETITEM", "SETITEMS"):
        first = marks.pop() if name == "SETITEMS" else len(stack) - 2
        stack[first - 1].update(zip(stack[first::2], stack[first + 1 :: 2], strict=True))
        del stack[first:]
    else:
        raise ValueError(f"it has the opcode {name}, which no batch has")
