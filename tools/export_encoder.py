"""What an exported encoder consists of: its config with the head's labels, its tensors, its tokenizer's files."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint import CheckpointError
from engine.data.pairs import PairTokenizer
from engine.data.tokenizer import KEPT
from models import encoder_weights, shards, weights
from models.encoder_config import EncoderConfig
from models.encoder_weights import Sources

from .generate import published

Source = tuple[EncoderConfig, dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]


def source(folder: Path) -> Source:
    """A model's config, the shapes of its tensors by name, their dtype, and what reads one of them. Raises ValueError,
    or, of a checkpoint, CheckpointError, where the folder does not hold the whole model."""
    try:
        model = encoder_weights.empty(encoder_weights.config_of(folder))
        found = encoder_weights.sources(model, folder)
        return model.config, *tensors(folder, model, found)
    except ValueError as error:
        raise error if published(folder) else CheckpointError(str(error)) from None


def tensors(
    folder: Path, model: nn.Module, found: Sources
) -> tuple[dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]:
    """Of a model that a folder holds with its head: the shapes by name, the dtype, what reads one. Raises
    ValueError."""
    if found.drawn:
        raise ValueError(
            f"{folder}: {found.drawn[0]}: got no such tensor, expected the head that config.json says; a model without "
            "one is already as it is published"
        )

    def get(name: str) -> Tensor:
        stored = found.stored[name]
        target = torch.empty(stored.shape, dtype=shards.DTYPES[stored.dtype])
        shards.read_into(stored, target)
        return target

    shapes = {name: found.stored[name].shape for name, _ in model.named_parameters()}
    return shapes, weights.dtype_of(found.stored), get


def tokenizer(folder: Path, named: str | None) -> PairTokenizer:
    """The tokenizer that a run keeps, or the one beside a published model, or in the folder `named`. Raises
    UsageError."""
    if named is not None:
        return PairTokenizer(Path(named))
    return PairTokenizer(folder if published(folder) else folder.parent / KEPT)


def write(folder: Path, made: Source, dtype: torch.dtype, largest: int, tokenizer: PairTokenizer) -> list[str]:
    """Every file into a folder that exists; returns a line for each."""
    config, shapes, _, get = made
    weights.save(folder, config.to_hf(), shapes, dtype, get, largest)
    tokenizer.copy_to(folder)
    return listed(folder)


def listed(folder: Path) -> list[str]:
    """A line for each file of a folder that was made."""
    return [f"  {file.name:34} {file.stat().st_size:>15,} bytes" for file in sorted(folder.iterdir())]
