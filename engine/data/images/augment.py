"""What training makes of an image: crops and reflections, each a pure function of (key, epoch, number of the row)."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from optimizers.random import Key, fold

Augment = Literal["none", "flip", "crop-flip", "resized-crop-flip"]
KINDS = ("none", "flip", "crop-flip", "resized-crop-flip")
CENTRE = 7 / 8  # of rows and columns: 224 of 256
NORMS = {  # mean and standard deviation of a channel
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def augmented(
    pixels: Tensor, kind: Augment, side: int, rows: Sequence[tuple[int, int]], key: Key, padding: int = 4
) -> Tensor:
    """Pixels uint8 (n, channels, h, w), of which `rows` gives (epoch, number): as many of `side` rows and columns.

    "flip" reflects half of them from left to right; "crop-flip" also takes a crop of the image padded with zeros;
    "resized-crop-flip" a crop of 8 to 100 % of its area, its sides in a ratio of 3/4 to 4/3, resized. This crop is of
    the image as it was read; the others are of the image resized.
    """
    draws = [fold(key, *row) for row in rows]
    if kind == "resized-crop-flip":
        pixels = torch.cat([_resized(image, side, draw) for image, draw in zip(pixels, draws, strict=True)])
    else:
        pixels = resized(pixels, (side, side))
    if kind == "none":
        return pixels
    if kind == "crop-flip":
        pixels = _cropped(pixels, draws, padding)
    flipped = torch.tensor([draw & 1 for draw in draws], dtype=torch.bool)[:, None, None, None]
    return torch.where(flipped, pixels.flip(3), pixels)


def _cropped(pixels: Tensor, draws: Sequence[int], padding: int) -> Tensor:
    """Each image moved by up to `padding` pixels, zeros where it was not."""
    n, _, h, w = pixels.shape
    places = 2 * padding + 1
    top = torch.tensor([(draw >> 1) % places for draw in draws])[:, None] + torch.arange(h)
    left = torch.tensor([(draw >> 24) % places for draw in draws])[:, None] + torch.arange(w)
    padded = F.pad(pixels, (padding,) * 4)
    return padded[torch.arange(n)[:, None, None], :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


def judged(pixels: Tensor, kind: Augment, side: int) -> Tensor:
    """What an evaluation sees of pixels uint8 (n, channels, h, w): the whole image in `side` rows and columns. Where
    training took crops of random size of larger images: 7/8 of rows and columns in the middle, as of 256 published
    recipes for ImageNet take 224, which then are not resized again."""
    h, w = pixels.shape[2:]
    if kind == "resized-crop-flip" and min(h, w) > side:
        rows, columns = (max(round(CENTRE * length), side) for length in (h, w))
        top, left = (h - rows) // 2, (w - columns) // 2
        pixels = pixels[:, :, top : top + rows, left : left + columns]
    return resized(pixels, (side, side))


def _resized(image: Tensor, side: int, draw: Key) -> Tensor:
    """A crop of random area and ratio of one image, (1, channels, side, side); the largest square in the middle where
    none fits."""
    _, h, w = image.shape
    for attempt in range(10):
        area, ratio, y, x = (fold(draw, attempt, name) / 2**63 for name in ("area", "ratio", "y", "x"))
        size, shape = (0.08 + 0.92 * area) * h * w, (4 / 3) ** (2 * ratio - 1)
        rows, columns = round((size / shape) ** 0.5), round((size * shape) ** 0.5)
        if 0 < rows <= h and 0 < columns <= w:
            top, left = int(y * (h - rows + 1)), int(x * (w - columns + 1))
            return resized(image[None, :, top : top + rows, left : left + columns], (side, side))
    least = min(h, w)
    top, left = (h - least) // 2, (w - least) // 2
    return resized(image[None, :, top : top + least, left : left + least], (side, side))


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (n, channels, h, w) -> uint8 of another size, bilinear, smoothed where it shrinks."""
    if tuple(pixels.shape[2:]) == size:
        return pixels
    found = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)


def means(norm: str, channels: int) -> tuple[list[float], list[float]]:
    """What `normalized` subtracts from each channel of pixels in [0, 1], and divides by."""
    mean, deviation = ([*values] for values in NORMS[norm])
    return (mean, deviation) if channels > 1 else ([sum(mean) / 3], [sum(deviation) / 3])


def normalized(pixels: Tensor, norm: str) -> Tensor:
    """uint8 -> float32, each channel less its mean over its deviation; of one channel the mean of three's."""
    mean, deviation = (torch.tensor(values) for values in means(norm, pixels.shape[1]))
    return (pixels.float() / 255 - mean[:, None, None]) / deviation[:, None, None]
