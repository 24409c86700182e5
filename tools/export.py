"""A trained model as Hugging Face publishes models, for transformers, vLLM, llama.cpp and whatever else reads these.

    python -m tools.export runs/snsm OUT                    the newest whole checkpoint
    python -m tools.export runs/snsm OUT --dtype bf16 --shard-size 2GB

OUT gets config.json, model.safetensors or several files with an index, the tokenizer, its special tokens and chat
template where there is one, and generation_config.json. Weights that an optimizer keeps in two parts are merged; a tied
matrix is written once. A ViT gets preprocessor_config.json instead of a tokenizer. A Hugging Face folder in RUN's place
is written anew, in another dtype or other files.

OUT is there as a whole or not at all. Exit codes: 0 done, 1 failure, 2 bad arguments, 5 an unusable checkpoint.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from engine.checkpoint import CheckpointError
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.terminal.flags import ask
from models import encoder_weights, shards, vit_weights, weights
from models.resnet import MODEL_TYPE as RESNET
from models.weights import Config
from optimizers.contract import UsageError

from . import export_encoder, export_vit, tokenizer_files
from .generate import find, in_products, load_model, published, tokenizer_of
from .plan import size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Export:
    run: tyro.conf.Positional[Path]
    """A run's folder, of which the newest whole checkpoint is used, one step-* folder, or a Hugging Face folder."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    dtype: Literal["saved", "fp32", "bf16", "fp16"] = "saved"
    """Of the weights; "saved": as they are."""
    shard_size: str = "5GB"
    """No file is larger, unless a single tensor is."""
    checkpoint: int | None = None
    """The step to use instead of the newest."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not in the run's folder."""


def export(config: Export) -> None:
    """Write the folder. Raises UsageError, CheckpointError, OSError."""
    try:
        largest = size(config.shard_size)
    except ValueError as error:
        raise UsageError(f"--shard-size: {error}") from None
    _free(config.out)
    try:
        folder = find(config.run, config.checkpoint).path
        assert folder is not None
        kind = _encoder if encoder_weights.published(folder) else _vit if vit_weights.published(folder) else _decoder
        write, saved = kind(folder, config)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    dtype = DTYPES.get(config.dtype, saved)
    fresh = config.out.with_name(f".export-{os.getpid()}")
    try:
        _make(config.out, fresh)
        lines = write(fresh, dtype, largest)
        fresh.rename(config.out)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(config.out)) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"{folder} -> {config.out}, {str(dtype).removeprefix('torch.')}")
    print("\n".join(lines))


def _make(out: Path, fresh: Path) -> None:
    """The folder that becomes OUT. Raises UsageError where there can be none of OUT's name."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        out.rmdir()
    except OSError as error:
        raise UsageError(
            f"OUT {out}: cannot be made: {error.strerror or error}; make room, or name another folder"
        ) from None


def _free(out: Path) -> None:
    """Raises UsageError where OUT is taken."""
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise UsageError(f"OUT {out}: is there already and no folder; name another one")
        if out.is_dir() and any(out.iterdir()):
            raise UsageError(f"OUT {out}: holds files already; name another folder, or empty this one")
    except OSError as error:
        raise UsageError(f"OUT {out}: cannot be looked at: {error.strerror or error}; name another folder") from None


Write = Callable[[Path, torch.dtype, int], list[str]]  # into a folder, in this dtype, in files of at most so many bytes


def _decoder(folder: Path, config: Export) -> tuple[Write, torch.dtype]:
    """What writes a language model, and the dtype that it has. Raises what reading it does."""
    if weights.read_json(folder / weights.CONFIG).get("model_type") == RESNET:
        raise UsageError(
            f"RUN: {folder}: is a ResNet, which Hugging Face has no form of; its model.safetensors has torchvision's "
            "names, and load_state_dict takes it as it is"
        )
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else tokenizer_of(folder)
    shape, shapes, saved, get = _source(folder)
    weights.check_vocabulary(tokenizer.vocab_size, shape, tokenizer.name, folder)
    return lambda fresh, dtype, largest: _write(fresh, shape, shapes, dtype, get, largest, tokenizer), saved


def _encoder(folder: Path, config: Export) -> tuple[Write, torch.dtype]:
    """The same of an encoder."""
    made, tokenizer = export_encoder.source(folder), export_encoder.tokenizer(folder, config.tokenizer)
    return lambda fresh, dtype, largest: export_encoder.write(fresh, made, dtype, largest, tokenizer), made[2]


def _vit(folder: Path, config: Export) -> tuple[Write, torch.dtype]:
    """The same of a ViT, which reads no text."""
    if config.tokenizer is not None:
        raise UsageError(f"--tokenizer: {folder} is a ViT, which reads images; leave it out")
    made = export_vit.source(folder)
    told = export_vit.preprocessor(folder, made[0])
    return lambda fresh, dtype, largest: export_vit.write(fresh, made, dtype, largest, told), made[2]


Source = tuple[Config, dict[str, tuple[int, ...]], torch.dtype, Callable[[str], Tensor]]


def _source(folder: Path) -> Source:
    """A model's config, the shapes of its tensors by name, their dtype, and what reads one of them.

    Raises ValueError or CheckpointError where the folder's model cannot be read."""
    if not published(folder) and in_products(folder):
        model = load_model(folder, torch.device("cpu"))
        params = {name: p.detach() for name, p in model.named_parameters()}
        first = next(iter(params.values())).dtype
        return model.config, {name: tuple(p.shape) for name, p in params.items()}, first, params.__getitem__
    try:
        config = weights.config_of(folder)
        stored = weights.tensors_of(folder)
        weights.check(weights.empty(config), stored, folder)
    except ValueError as error:
        raise error if published(folder) else CheckpointError(str(error)) from None
    names = [name for name, _ in weights.empty(config).named_parameters()]

    def get(name: str) -> Tensor:
        target = torch.empty(stored[name].shape, dtype=shards.DTYPES[stored[name].dtype])
        shards.read_into(stored[name], target)
        return target

    return config, {name: stored[name].shape for name in names}, weights.dtype_of(stored), get


def _write(
    folder: Path,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    largest: int,
    tokenizer: Tokenizer,
) -> list[str]:
    """Every file into `folder`; returns a line for each."""
    beside = tokenizer_files.write(folder, tokenizer, config.max_position_embeddings)
    made = weights.save(folder, {**config.to_hf(), **beside.ids}, shapes, dtype, get, largest)
    lines = [f"  {name:34} {(folder / name).stat().st_size:>15,} bytes" for name in [*made, *beside.files]]
    return lines + ([f"  tokenizer: {beside.remark}"] if beside.remark else [])


if __name__ == "__main__":
    from recipes.cli import main

    main(lambda args: ask(lambda prog: tyro.cli(Export, args=args, description=__doc__, prog=prog)), export)
