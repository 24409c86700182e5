"""Files of tensors in safetensors' format: their heads, and their tensors, a slice at a time.

A file is 8 bytes of length, a JSON head of that length, and the tensors' bytes.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEAD = 100 * 2**20  # bytes; safetensors takes no longer head
SLICE = 2**22  # bytes that are read or written at once


class Stored(NamedTuple):
    """A tensor in a file: its dtype as the file names it, its shape, and its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def head(file: Path) -> dict[str, Stored]:
    """The tensors of a file, none of which is read. Raises ValueError where the file is damaged or cut off."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size < 8 or length > HEAD:
            raise ValueError(f"{file}: got {size} bytes that are no safetensors file; fetch it again")
        if size < 8 + length:
            raise _cut_off(file, size, 8 + length)
        text = content.read(length)
    found, end = {}, 0
    try:
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                first, last = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                found[name] = Stored(file, str(entry["dtype"]), shape, 8 + length + first)
                end = max(end, last)
                width = DTYPES.get(entry["dtype"])
                if first < 0 or (width and last - first != math.prod(shape) * width.itemsize):
                    raise ValueError(f"{name} has bytes {first} to {last} and the shape {list(shape)}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its head is damaged ({' '.join(str(error).split())}); fetch it again") from None
    if size < 8 + length + end:
        raise _cut_off(file, size, 8 + length + end)
    return found


def _cut_off(file: Path, got: int, expected: int) -> ValueError:
    return ValueError(f"{file}: is cut off: got {got} bytes, expected {expected}; fetch it again")


@torch.no_grad()
def read_into(stored: Stored, target: Tensor) -> None:
    """Fill a contiguous tensor of the same shape, of any dtype and device: what is read exists a slice at a time.

    Raises ValueError where the file ends early.
    """
    dtype, flat = DTYPES[stored.dtype], target.view(-1)
    same, count = flat.device.type == "cpu" and flat.dtype == dtype, SLICE // dtype.itemsize
    buffer = torch.empty(0 if same else min(count, flat.numel()), dtype=dtype)
    with stored.file.open("rb", buffering=0) as content:
        content.seek(stored.start)
        for start in range(0, flat.numel(), count):
            part = flat[start : start + count]
            into = part if same else buffer[: part.numel()]
            left = into.view(torch.uint8).numpy().data
            while left:
                got = content.readinto(left)
                if not got:
                    raise ValueError(f"{stored.file}: ends early; fetch it again")
                left = left[got:]
            if not same:
                part.copy_(into)


def equal(one: Stored, other: Stored) -> bool:
    """Do two tensors hold the same bytes?"""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left = math.prod(one.shape) * DTYPES[one.dtype].itemsize
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        while left > 0:
            size = min(left, SLICE)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True


def write(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, get: Callable[[str], Tensor]) -> None:
    """Write tensors of these names and shapes, each as `get` gives it when its turn comes, rounded to `dtype`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = get(name).detach()
            assert tuple(tensor.shape) == shape, name
            for part in tensor.contiguous().view(-1).split(SLICE // dtype.itemsize):
                out.write(part.to("cpu", dtype).view(torch.uint8).numpy().data)
