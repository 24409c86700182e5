"""What an exported ViT consists of: its config with the classes' names, its tensors, and how its images are read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.atomic import write_whole
from engine.checkpoint import TRAINER, CheckpointError
from engine.data.images.augment import NORMS, means
from models import vit_weights, weights
from models.vit_config import ViTConfig

from .export_encoder import listed, tensors
from .generate import published

PREPROCESSOR = "preprocessor_config.json"
Source = tuple[ViTConfig, dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]


def source(folder: Path) -> Source:
    """A model's config, the shapes of its tensors by name, their dtype, and what reads one of them. Raises ValueError,
    or, of a checkpoint, CheckpointError, where the folder does not hold the whole model."""
    try:
        model = vit_weights.empty(vit_weights.config_of(folder))
        return model.config, *tensors(folder, model, vit_weights.found_in(folder, model))
    except ValueError as error:
        raise error if published(folder) else CheckpointError(str(error)) from None


def preprocessor(folder: Path, config: ViTConfig) -> Mapping[str, Any] | None:
    """What says to transformers how pixels become numbers: as the `--norm` of a run had it; that of a
    published folder, if it has one. Raises ValueError."""
    if published(folder):
        return weights.read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else None
    norm = weights.read_json(folder / TRAINER).get("config", {}).get("norm")
    if norm not in NORMS:
        return None
    mean, deviation = means(norm, config.num_channels)
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
    }


def write(
    folder: Path, made: Source, dtype: torch.dtype, largest: int, preprocessor: Mapping[str, Any] | None
) -> list[str]:
    """Every file into a folder that exists; returns a line for each."""
    config, shapes, _, get = made
    weights.save(folder, config.to_hf(), shapes, dtype, get, largest)
    if preprocessor is not None:
        write_whole(folder / PREPROCESSOR, json.dumps(preprocessor, indent=2) + "\n")
    return listed(folder)
