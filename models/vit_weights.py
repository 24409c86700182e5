"""Weights of a ViT from a folder as Hugging Face publishes it, with its own classifier or a new one; and to one.

    model = load(folder)                        as published
    model = load(folder, labels=("cat", "dog")) with a classifier for these, drawn where the folder's is of others

Errors are ValueError in one line: the file, the tensor, what was got, what was expected, and what to do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import weights
from .encoder_weights import Sources, fill, sources
from .vit import ViT
from .vit_config import ViTConfig

CLASSIFIER = "classifier."


def published(folder: Path) -> bool:
    """Is there a ViT's config.json?"""
    try:
        return bool(weights.read_json(folder / weights.CONFIG).get("model_type") == "vit")
    except (OSError, ValueError, AttributeError):
        return False


def config_of(folder: Path, labels: tuple[str, ...] = ()) -> ViTConfig:
    """The shape of the model in a folder, of its own classes or of these. Raises ValueError."""
    try:
        found = ViTConfig.from_hf(weights.read_json(folder / weights.CONFIG))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    return replace(found, labels=labels) if labels else found


def empty(config: ViTConfig) -> ViT:
    """A model without memory."""
    with torch.device("meta"):
        return ViT(config)


def found_in(folder: Path, model: ViT) -> Sources:
    """What fills the model, from the heads of files alone. The folder's classifier is used where its config.json names
    the model's classes; else the model's is drawn. Raises ValueError where the body is not the model's."""
    return sources(model, folder, new_head=config_of(folder).labels != model.config.labels)


def load(folder: Path, labels: tuple[str, ...] = (), seed: int = 0) -> ViT:
    """The model in a folder, in float32, on the host and in evaluation mode. Raises ValueError."""
    model = empty(config_of(folder, labels))
    found = found_in(folder, model)
    model.allocate("cpu")
    fill(dict(model.named_parameters()), model, found, seed)
    return model.eval()


def save(folder: Path, model: ViT, **also: Any) -> None:
    """Write a model in float32 into a folder that exists; `also` goes into its config.json."""
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    weights.save(folder, {**model.config.to_hf(), **also}, shapes, torch.float32, params.__getitem__, 2**40)
