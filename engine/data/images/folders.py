"""Folders of image files: train/CLASS/*.jpg, and held-out ones in val/, validation/, dev/ or test/."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from optimizers.contract import UsageError

from .decode import decoded
from .sets import Filed, Held, Images, Shape, Split, said

ENDS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
HELD_OUT = ("val", "validation", "dev", "test")
MEMORY = 2**30  # bytes: a larger set is decoded an image at a time, each time it is needed


def here(folder: Path) -> bool:
    """Does a folder hold a part to train on?"""
    return (folder / "train").is_dir()


def read(folder: Path, side: int = 0, most: int = MEMORY) -> Split:
    """Both parts, with the classes of train/ in the order of their names. With `side`, resized to squares; else all
    must have one size. Raises UsageError."""
    name = next((name for name in HELD_OUT if (folder / name).is_dir()), None)
    if name is None:
        raise UsageError(f"{folder}: got no held-out images, expected one of the folders {', '.join(HELD_OUT)}")
    classes = tuple(sorted(one.name for one in (folder / "train").iterdir() if one.is_dir()))
    if len(classes) < 2:
        raise UsageError(f"{folder / 'train'}: got {len(classes)} folders of classes, expected two or more")
    train = _files(folder / "train", classes)
    first = decoded(train[0][0], str(train[0][0]), side)
    shape: Shape = (first.shape[0], first.shape[1], first.shape[2])
    parts = [_images(part, shape, side, most, folder) for part in (train, _files(folder / name, classes))]
    return Split(parts[0], parts[1], classes)


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Every image file below, with its class."""
    strangers = sorted(one.name for one in folder.iterdir() if one.is_dir() and one.name not in classes)
    if strangers:
        raise UsageError(
            f"{folder / strangers[0]}: is no class of train/, which has {len(classes)}: {', '.join(classes[:5])}; "
            "rename or remove it"
        )
    found = [
        (file, k)
        for k, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*") if (folder / name).is_dir() else ())
        if file.suffix.lower() in ENDS
    ]
    if not found:
        raise UsageError(f"{folder}: got no image files, expected some in folders of their classes ({' '.join(ENDS)})")
    return found


def _images(files: list[tuple[Path, int]], shape: Shape, side: int, most: int, root: Path) -> Images:
    targets = torch.tensor([k for _, k in files])
    decode = partial(_decoded, shape=shape, side=side)
    made = Filed([file for file, _ in files], targets, shape, decode, root)
    if len(files) * shape[0] * shape[1] * shape[2] > most:
        return made
    return Held(made.get(range(len(files))), targets)


def _decoded(file: Path, shape: Shape, side: int) -> Tensor:
    image = decoded(file, str(file), side)
    if tuple(image.shape) != shape:
        got: Shape = (image.shape[0], image.shape[1], image.shape[2])
        raise UsageError(f"{file}: got {said(got)}, expected {said(shape)} as the first one's; give --resize")
    return image
