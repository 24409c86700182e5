"""MNIST's idx files, as published, also compressed: train-images-idx3-ubyte, t10k-images-idx3-ubyte, and labels."""

import struct
from pathlib import Path

import numpy as np
import torch

from optimizers.contract import UsageError

from ..compressed import DAMAGE, SUFFIXES, open_bytes
from .sets import Held, Split

PARTS = ("train", "t10k")


def here(folder: Path) -> bool:
    """Does a folder hold such files?"""
    return any(_found(folder, f"{part}-images-idx3-ubyte") for part in PARTS)


def read(folder: Path) -> Split:
    """Both parts, the classes named by their numbers. Raises UsageError."""
    train, held_out = (_part(folder, part) for part in PARTS)
    most = int(max(train.targets.max(), held_out.targets.max())) if len(train.targets) and len(held_out.targets) else 0
    return Split(train, held_out, tuple(map(str, range(most + 1))))


def _part(folder: Path, part: str) -> Held:
    images, labels = (_array(folder, f"{part}-{kind}-ubyte", n) for kind, n in (("images-idx3", 3), ("labels-idx1", 1)))
    if len(images) != len(labels):
        raise UsageError(
            f"{folder}: got {len(images):,} {part} images and {len(labels):,} labels, expected equally many; fetch "
            "them again"
        )
    return Held(torch.from_numpy(images)[:, None], torch.from_numpy(labels))


def _found(folder: Path, name: str) -> Path | None:
    return next((file for end in ("", *SUFFIXES) if (file := folder / f"{name}{end}").is_file()), None)


def _array(folder: Path, name: str, dims: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    file = _found(folder, name)
    if file is None:
        raise UsageError(f"{folder}: got no {name}, expected it there, or compressed ({' '.join(SUFFIXES)}); fetch it")
    try:
        with open_bytes(file) as stream:
            data = stream.read()
    except DAMAGE as error:
        raise UsageError(f"{file}: is damaged or cut off ({error}); fetch it again") from None
    head = 4 + 4 * dims
    if len(data) < head or data[:4] != bytes([0, 0, 8, dims]):
        raise UsageError(
            f"{file}: begins with {data[:4].hex() or 'nothing'}, expected 000008{dims:02x}, an idx file of bytes in "
            f"{dims} dimension{'s' * (dims > 1)}; fetch it again"
        )
    shape = struct.unpack(f">{dims}I", data[4:head])
    if len(data) - head != int(np.prod(shape, dtype=np.int64)):
        raise UsageError(f"{file}: got {len(data) - head:,} bytes, expected {shape} of them; fetch it again")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()
