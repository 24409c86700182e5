"""Many small JPEGs in one .npz: `train_data`, bytes of all files one behind another without the header that they share
(`jpeg_header`), `train_offsets` (n + 1), `train_labels` (n), the same of `test_...`, and `classes`, names."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimizers.contract import UsageError

from .decode import decoded
from .sets import Held, Split

PARTS = ("train", "test")
FIELDS = ("data", "offsets", "labels")


def here(path: Path) -> bool:
    """Is this such a file, or a folder with one?"""
    return _file(path) is not None


def read(path: Path) -> Split:
    """Both parts, decoded. Raises UsageError."""
    file = _file(path)
    assert file is not None
    names = ["jpeg_header", "classes", *(f"{part}_{field}" for part in PARTS for field in FIELDS)]
    try:
        with np.load(file, allow_pickle=False) as stored:
            if missing := [name for name in names if name not in stored]:
                raise UsageError(f"{file}: got no {missing[0]}, expected {', '.join(names)}; fetch it again")
            found = {name: stored[name] for name in names}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{file}: is no whole .npz ({error}); fetch it again") from None
    train, held_out = (_part(file, found, part) for part in PARTS)
    return Split(train, held_out, tuple(map(str, found["classes"].tolist())))


def _file(path: Path) -> Path | None:
    if path.is_dir():
        inside = sorted(path.glob("*.npz"))
        return inside[0] if len(inside) == 1 else None
    return path if path.suffix == ".npz" and path.is_file() else None


def _part(file: Path, found: dict[str, Any], part: str) -> Held:
    data, offsets, labels = (found[f"{part}_{field}"] for field in FIELDS)
    if len(offsets) != len(labels) + 1 or len(labels) == 0:
        raise UsageError(
            f"{file}: got {len(offsets):,} {part}_offsets and {len(labels):,} {part}_labels, expected one offset more "
            "than labels; fetch it again"
        )
    header, body = found["jpeg_header"].tobytes(), data.tobytes()
    pixels: list[torch.Tensor] = []
    for i, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        image = decoded(io.BytesIO(header + body[first:last].removeprefix(header)), f"{file}: {part} image {i}")
        if pixels and image.shape != pixels[0].shape:
            raise UsageError(
                f"{file}: {part} image {i}: got {list(image.shape)}, expected {list(pixels[0].shape)} as the first"
            )
        pixels.append(image)
    return Held(torch.stack(pixels), torch.from_numpy(labels.astype(np.int64)))
