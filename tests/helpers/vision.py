"""Small models of images, whose every part shows in what they give; and small sets of images in every format."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.step.segments import cut
from engine.step.step import Step
from models.resnet import ResNet, ResNetConfig
from models.vit import ViT
from models.vit_config import ViTConfig
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.sgd import sgd

LABELS = ("cat", "dog", "owl")


def resnet(cifar: bool = True, seed: int = 1, **changed: Any) -> ResNet:
    """A ResNet in training mode, of every kind of block: the same size, a new one, and more channels."""
    shape = dict(blocks=(2, 2), widths=(4, 8), cifar=cifar, channels=3, labels=LABELS)
    return wide(ResNet(ResNetConfig(**{**shape, **changed}), seed), seed)


def vit(seed: int = 1, **changed: Any) -> ViT:
    """A ViT in training mode, without dropout."""
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    shape = {**sizes, "image_size": 16, "patch_size": 8, "num_channels": 3, "labels": LABELS}
    return wide(ViT(ViTConfig(**{**shape, **changed}), seed), seed)


def wide(model: Any, seed: int) -> Any:
    """Weights large enough for every part to show, norms and biases included."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.3)
            elif isinstance(model, ViT):
                p.mul_(8)
    return model


def batch_of(size: int = 16, rows: int = 6, channels: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Images and classes; one row has no target."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(len(LABELS), (rows,), generator=draw)
    targets[1] = -100
    return {"pixels": torch.randn(rows, channels, size, size, generator=draw), "targets": targets}


def stepped(model: nn.Module, batches: Sequence[dict[str, Tensor]], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the gradients with which SGD at rate 1 moved; buffers of `model` move, weights do not."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in params.items()}
    optimizer = partition(params, [Group("all", sgd(0.0), ("",), 1.0, 0.0)])
    step = Step(cut(model), params, optimizer, optimizer.init(params), **{"mode": "off", **options})
    loss = step(batches).loss
    return loss, {name: before[name] - p for name, p in params.items()}


def drawn(rows: int, size: int = 8, channels: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (rows, size, size, channels) uint8 of three classes that differ in where they are bright, and classes."""
    draw = np.random.default_rng(seed)
    targets = np.arange(rows) % len(LABELS)
    pixels = draw.integers(0, 60, (rows, size, size, channels))
    for i, k in enumerate(targets):
        pixels[i, k * size // 3 : (k + 1) * size // 3] += 150
    return pixels.astype(np.uint8), targets.astype(np.uint8)


def idx(folder: Path, rows: int = 96, held_out: int = 24, size: int = 8, packed: bool = False) -> Path:
    """A folder as MNIST is published, of `drawn` images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", rows, 0), ("t10k", held_out, 1)):
        pixels, targets = drawn(count, size, seed=seed)
        images = struct.pack(">BBBBIII", 0, 0, 8, 3, count, size, size) + pixels.tobytes()
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, count) + targets.tobytes()
        for file, data in ((f"{name}-images-idx3-ubyte", images), (f"{name}-labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{file}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / file).write_bytes(data)
    return folder
