"""A set of images from wherever it lies, in whatever form."""

from pathlib import Path

from optimizers.contract import UsageError

from . import cifar, folders, idx, packed
from .sets import Split

FORMS = "MNIST's idx files, CIFAR's Python batches, one packed .npz, or train/CLASS/ and val/CLASS/ with image files"


def read(path: Path, side: int = 0) -> Split:
    """The set in a folder or file. `side` resizes the images of folders. Raises UsageError."""
    if not path.exists():
        raise UsageError(f"--data {path}: is not there; give a folder with {FORMS}")
    if side and not folders.here(path):
        raise UsageError(f"--resize {side}: is for folders of image files; {path} has images of one size, leave it out")
    if folders.here(path):
        return folders.read(path, side).checked(path)
    if idx.here(path):
        return idx.read(path).checked(path)
    if cifar.here(path):
        return cifar.read(path).checked(path)
    if packed.here(path):
        return packed.read(path).checked(path)
    raise UsageError(f"--data {path}: got none of the forms that are known, expected {FORMS}")
