"""A labelled set of images of one size: in memory, or files that are decoded when they are asked for.

train, held_out = read("cifar-10-batches-py")
train.get([4, 0])                                   uint8 (2, channels, rows, columns)
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optimizers.contract import UsageError

Shape = tuple[int, int, int]  # channels, rows, columns


class Images(Protocol):
    """Images by number, with their classes."""

    @property
    def shape(self) -> Shape: ...

    @property
    def targets(self) -> Tensor:
        """Classes, int64 (n,)."""

    @property
    def fingerprint(self) -> str:
        """Equal where images, classes and order are."""

    def get(self, numbers: Sequence[int]) -> Tensor:
        """Their pixels, uint8 (k, channels, rows, columns). Raises UsageError for a file that cannot be decoded."""


class Held:
    """Images in memory: pixels uint8 (n, channels, rows, columns), targets int64 (n,)."""

    def __init__(self, pixels: Tensor, targets: Tensor) -> None:
        self.pixels, self.targets = pixels.contiguous(), targets.long()
        self.shape: Shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
        for part in (self.pixels, self.targets):
            digest.update(part.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:32]

    def get(self, numbers: Sequence[int]) -> Tensor:
        return self.pixels[torch.as_tensor(numbers, dtype=torch.int64)]


class Filed:
    """Image files, decoded by `decode(file)` into uint8 (channels, rows, columns) each time they are asked for."""

    def __init__(
        self, files: Sequence[Path], targets: Tensor, shape: Shape, decode: Callable[[Path], Tensor], root: Path
    ) -> None:
        self.files, self.targets, self.shape, self.decode = list(files), targets.long(), shape, decode
        digest = hashlib.sha256(f"{shape}{targets.tolist()}".encode())
        for file in self.files:
            digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        self.fingerprint = digest.hexdigest()[:32]

    def get(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self.decode(self.files[i]) for i in numbers])


class Split(NamedTuple):
    """Both parts of a set, and the names of the classes in the order of their numbers."""

    train: Images
    held_out: Images
    classes: tuple[str, ...]

    def checked(self, source: Path) -> "Split":
        """The same. Raises UsageError where the two parts differ in size, or a class has no name."""
        if self.train.shape != self.held_out.shape:
            raise UsageError(
                f"{source}: got images of {said(self.train.shape)} to train on and of {said(self.held_out.shape)} held "
                "out, expected one size; give --resize"
            )
        for name, images in (("train", self.train), ("held-out", self.held_out)):
            if len(images.targets) == 0:
                raise UsageError(f"{source}: got no {name} images, expected some; fetch the set again")
            most, least = int(images.targets.max()), int(images.targets.min())
            if least < 0 or most >= len(self.classes):
                raise UsageError(
                    f"{source}: got class {most if least >= 0 else least} among {name} images, expected numbers below "
                    f"{len(self.classes)}, the number of classes"
                )
        if len(self.classes) < 2:
            raise UsageError(f"{source}: got {len(self.classes)} class, expected two or more")
        return self


def said(shape: Shape) -> str:
    """A size in words."""
    return f"{shape[1]} x {shape[2]} pixels of {shape[0]} channel{'s' * (shape[0] != 1)}"
