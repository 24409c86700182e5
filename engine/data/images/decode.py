"""Image files by Pillow, of the extra `tasks`."""

from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from optimizers.contract import UsageError


def decoded(file: BinaryIO | Path, name: str, side: int = 0) -> Tensor:
    """The pixels of an image file, uint8 (3, rows, columns). With `side`, of its largest square in the middle, resized
    to so many rows and columns. Raises UsageError, which begins with `name`."""
    pillow: Any = library(name)
    read = pillow.open
    try:
        with read(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        said = " ".join(str(error).split())[:100]
        raise UsageError(f"{name}: cannot be decoded ({said}); fetch or remove it") from None
    if side:
        width, height = image.size
        least = min(width, height)
        left, top = (width - least) // 2, (height - least) // 2
        box = (left, top, left + least, top + least)
        image = image.resize((side, side), pillow.Resampling.BILINEAR, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def library(name: str) -> Any:
    """Pillow's module. Raises UsageError where it is not installed."""
    try:
        return import_module("PIL.Image")
    except ImportError:
        raise UsageError(f"{name}: needs Pillow, which is not installed: pip install 'leanstep[tasks]'") from None
