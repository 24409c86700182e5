"""A run that begins with the weights of a published model: what `--init DIR` asks of the folder.

Errors are UsageError: the file, the tensor, what was got, what was expected, and what to do.
"""

import json
import shutil
from pathlib import Path
from typing import TypeVar

from engine.data.ending import TOKENIZER_CONFIG, read_beside
from models import weights
from models.gpt2_config import Gpt2Config
from models.weights import Config, Model
from optimizers.contract import Params, UsageError

from .errors import usage

Shape = TypeVar("Shape", bound=Config)
BESIDE = ("special_tokens_map.json", "generation_config.json", "chat_template.jinja", "chat_template.json")


def shape(folder: Path, vocabulary: int, tokenizer: str, kind: type[Shape]) -> Shape:
    """The model's own. Raises UsageError where it is not of this kind, or the tokenizer's vocabulary is larger."""
    with usage("--init"):
        config = weights.config_of(folder)
        weights.check_vocabulary(vocabulary, config, tokenizer, folder)
    if not isinstance(config, kind):
        got = "a GPT-2" if isinstance(config, Gpt2Config) else "another decoder"
        raise UsageError(
            f"--init: got {got} in {folder}, which is not trained here; GPT-2 is by recipes.omgd gpt2 and "
            "recipes.baseline gpt2, other decoders by all the others"
        )
    return config


def bare(folder: Path) -> bool:
    """Is there a shape without weights? That is enough for a plan, and for nothing else."""
    there = any((folder / name).is_file() for name in weights.PICKLES) or any(folder.glob("*.safetensors"))
    return (folder / weights.CONFIG).is_file() and not there


def check(folder: Path, sequence: int, read: bool) -> None:
    """Raises UsageError where the model has fewer positions than a sequence or, if its weights are to be `read`, where
    the folder's files do not hold what its config.json describes. Reads heads only."""
    with usage("--init"):
        config = weights.config_of(folder)
        if read:
            weights.check(weights.empty(config), weights.tensors_of(folder), folder)
    if sequence > config.max_position_embeddings:
        raise UsageError(
            f"--sequence: got {sequence}, expected at most {config.max_position_embeddings}, the positions of the "
            f"model in {folder}"
        )


def fill(folder: Path, model: Model, params: Params) -> None:
    """The folder's values for parameters that have memory, tensor by tensor."""
    with usage("--init"):
        stored = weights.tensors_of(folder)
        weights.check(model, stored, folder)
        weights.fill(params, stored)


def keep_beside(folder: Path, into: Path) -> None:
    """Put what the published tokenizer came with beside a run's copy of it: template, special tokens, settings."""
    settings = {**read_beside(folder, TOKENIZER_CONFIG), **read_beside(into, TOKENIZER_CONFIG)}
    (into / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)
