"""One safetensors file of named tensors: in their order, tied ones once, read one at a time.

"names" in the file's head keeps the order and says under which name each tensor is stored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optimizers.contract import Params

from ..atomic import naming

SCHEMA = 1
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEAD = ("format", "schema", "names", "owners", "parked")  # keys of the head that are not the caller's


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used. The message names the file or tensor and what is wrong with it."""


class WriteError(CheckpointError):
    """The disk did not take a checkpoint: it is full, gone or read-only. What was whole before is whole still."""


def ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name -> the first name of the same tensor. Same means same memory, read in the same way."""
    first: dict[object, str] = {}
    keys = {n: (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else n for n, t in tensors.items()}
    return {name: first.setdefault(key, name) for name, key in keys.items()}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`ties`, after checking that every tensor comes back as it is. Raises CheckpointError."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES or name == "__metadata__":
            raise CheckpointError(f"{name}: is {tensor.dtype}, {tensor.layout}, on {tensor.device}; it cannot be saved")
        if not tensor.is_contiguous():
            raise CheckpointError(
                f"{name}: strides {tensor.stride()} of shape {tuple(tensor.shape)} are not contiguous; "
                "make it contiguous where it is created, or the resumed run is not bitwise the same"
            )
    names = ties(tensors)
    end: dict[torch.device, tuple[int, str]] = {}
    for name in sorted(set(names.values()), key=lambda name: tensors[name].data_ptr()):
        t = tensors[name]
        before, other = end.get(t.device, (0, ""))
        if t.nbytes and t.data_ptr() and t.data_ptr() < before:
            raise CheckpointError(
                f"{other} and {name}: share a part of their memory and would come back apart; clone one of them"
            )
        end[t.device] = max((t.data_ptr() + t.nbytes, name), (before, other))
    return names


def write(file: Path, tensors: Params, header: Mapping[str, str], made: Callable[[str], Tensor] | None = None) -> None:
    """Write the file, in safetensors' format, one tensor in host memory at a time, its mode as the umask has it.

    `made(name)` gives the values in the place of those in `tensors`, of the same shape and dtype. Raises
    CheckpointError where something cannot be stored, OSError where the disk refuses.
    """
    names = storable(tensors)
    head = {"format": "pt", "schema": str(SCHEMA), "names": json.dumps(names), **header}
    if odd := [key for key, value in head.items() if not isinstance(value, str)]:
        raise CheckpointError(f"{file}: cannot be written: {odd} in its head must be texts")
    entries: dict[str, Any] = {"__metadata__": head}
    own, at = list(dict.fromkeys(names.values())), 0
    order = sorted(own, key=lambda name: -tensors[name].element_size())  # each begins at a multiple of its items
    for name in order:
        t = tensors[name]
        entries[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with naming(file), file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = made(name) if made else tensors[name]
            assert (tensor.shape, tensor.dtype) == (tensors[name].shape, tensors[name].dtype), name
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            out.write(flat.view(torch.uint8).numpy().data)


class TensorFile:
    """A file that `write` wrote, open. Raises CheckpointError, naming it, where it is something else."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.head: dict[str, str]
        try:
            content: Any = safe_open(file, framework="pt")  # published without types
            stored, self.head = set(content.keys()), content.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged, not a safetensors file: {error}") from None
        if (schema := self.head.get("schema")) != str(SCHEMA):
            raise CheckpointError(f"{file}: foreign, its head has schema {schema!r}, expected '{SCHEMA}'")
        names = self.json("names", dict)
        if not all(isinstance(first, str) and names.get(first) == first for first in names.values()):
            raise CheckpointError(f'{file}: damaged, "names" in its head ties tensors to others that are not in it')
        if odd := stored.symmetric_difference(names.values()):
            raise CheckpointError(f'{file}: damaged, {sorted(odd)[:3]} are in its head\'s "names" or stored, not both')
        self.names: dict[str, str] = names
        self._content = content

    def json(self, key: str, kind: type) -> Any:
        """What the head holds under `key`, of the given kind. Raises CheckpointError where it does not."""
        text = self.head.get(key)
        try:
            value = json.loads(text) if text is not None else None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.file}: damaged, {key!r} in its head is not JSON: {error}") from None
        if not isinstance(value, kind):
            got = "is missing from its head" if text is None else f"in its head is a {type(value).__name__}"
            raise CheckpointError(f"{self.file}: damaged, {key!r} {got}, expected a {kind.__name__}")
        return value

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            tensor: Tensor = self._content.get_tensor(self.names[name])
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{self.file}: {name}: cannot be read: {' '.join(str(error).split())}") from None
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, which is not read."""
        return tuple(self._content.get_slice(self.names[name]).get_shape())

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Shape and dtype (its name in the file where torch has none) of one tensor, which is not read."""
        part = self._content.get_slice(self.names[name])
        stored = part.get_dtype()
        return tuple(part.get_shape()), next((dtype for dtype, name in DTYPES.items() if name == stored), stored)

    def everything(self) -> dict[str, Tensor]:
        """All tensors in the order in which they were saved, tied ones as one object."""
        stored = {first: self.read(first) for first in dict.fromkeys(self.names.values())}
        return {name: stored[first] for name, first in self.names.items()}
