"""Weights from and to a folder as Hugging Face publishes it: config.json, and model.safetensors or shards.

model = load(folder, torch.bfloat16, device)           a tensor at a time, never two copies of anything large

Everything that does not fit is a ValueError in one line, before memory is taken: the file, the tensor, what was got,
what was expected, and what to do.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import shards
from .config import DecoderConfig
from .decoder import Decoder
from .families import FAMILIES
from .gpt2 import Gpt2
from .gpt2_config import Gpt2Config, is_gpt2
from .shards import Stored

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TABLES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # that old files hold beside the weights
OUTPUT, EMBEDDINGS = "lm_head.weight", ("model.embed_tokens.weight", "transformer.wte.weight")
BARE = re.compile(r"(?:wte|wpe|ln_f|h\.\d+)\.")  # names of a GPT-2 that was published without its head

Config = DecoderConfig | Gpt2Config
Model = Decoder | Gpt2


def is_folder(path: Path) -> bool:
    """Does the folder hold a model as Hugging Face publishes it?"""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (SINGLE, INDEX, *PICKLES))


def parsed(config: Mapping[str, Any]) -> Config:
    """The shape that a config.json says. Raises ValueError where no model here has it."""
    if is_gpt2(config):
        return Gpt2Config.from_hf(config)
    if (kind := config.get("model_type") or "llama") not in tuple(FAMILIES):
        known = ", ".join((*FAMILIES, "gpt2"))
        raise ValueError(f"config.json: model_type: got {kind!r}, expected a language model, one of {known}")
    return DecoderConfig.from_hf(config)


def config_of(folder: Path) -> Config:
    """The shape of the model in a folder. Raises ValueError where there is none, or one that is not known here."""
    try:
        return parsed(read_json(folder / CONFIG))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def load(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Model:
    """The model in a folder, in evaluation mode; without `dtype` in that of its embedding. Raises ValueError."""
    stored = tensors_of(folder)
    model = empty(config_of(folder)).to(dtype or dtype_of(stored))
    check(model, stored, folder)
    model.allocate(device)
    fill(dict(model.named_parameters()), stored)
    return model.eval()


def empty(config: Config) -> Model:
    """A model without memory."""
    with torch.device("meta"):
        return Gpt2(config) if isinstance(config, Gpt2Config) else Decoder(config)


def dtype_of(stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype of the embedding, as that of the whole."""
    first = stored[embedding_of(stored)] if embedding_of(stored) else next(iter(stored.values()))
    return shards.DTYPES.get(first.dtype, torch.float32)


def embedding_of(names: Collection[str]) -> str:
    """The embedding among these names, "" where there is none."""
    return next((name for name in EMBEDDINGS if name in names), "")


def tensors_of(folder: Path) -> dict[str, Stored]:
    """All tensors in a folder's files. Raises ValueError where a file is missing, damaged or cut off."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        files = _shards(folder / INDEX)
    else:
        why = next((f"only {name}, a pickle" for name in PICKLES if (folder / name).is_file()), "no weights")
        raise ValueError(f"{folder}: got {why}; expected {SINGLE} or {INDEX}; fetch or convert the model to these")
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in shards.head(file).items():
            name = f"transformer.{name}" if BARE.match(name) else name
            if name in found:
                raise ValueError(f"{file}: {name}: is in {found[name].file.name} too; fetch the folder again")
            if not name.endswith(TABLES):
                found[name] = stored
    return found


def _shards(index: Path) -> list[Path]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(
            f"{index}: weight_map: got {str(where)[:60]}, expected the file of each tensor; fetch it again"
        )
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: weight_map: got the file {name!r}, expected one beside it; fetch it again")
        if not (index.parent / name).is_file():
            tensor = next(tensor for tensor, file in where.items() if file == name)
            raise ValueError(
                f"{index.parent / name}: is not there, expected one of {len(names)} files that {INDEX} names, with "
                f"{tensor}; fetch it"
            )
    return [index.parent / name for name in names]


def check(model: Model, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises ValueError where a folder's tensors are not the model's: names, shapes, dtypes, and what is tied."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name.rpartition(".")[2] not in "PB"}
    if missing := [name for name in expected if name not in stored]:
        way = "fetch the folder again, or give the config.json of this model"
        if missing == [OUTPUT]:
            way = "set tie_word_embeddings to true in it if the embedding is the output matrix"
        raise ValueError(
            f"{folder}: {missing[0]}: got no such tensor{_more(missing, 'nor')}, expected "
            f"{list(expected[missing[0]])} by {CONFIG}; {way}"
        )
    strangers = [name for name in stored if name not in expected]
    if strangers == [OUTPUT] and model.lm_head is None:
        if not shards.equal(stored[OUTPUT], stored[embedding_of(expected)]):
            raise ValueError(
                f"{stored[OUTPUT].file}: {OUTPUT}: got other numbers than {embedding_of(expected)}, to which {CONFIG} "
                "ties it; set tie_word_embeddings to false in it"
            )
        strangers = []
    if strangers:
        raise ValueError(
            f"{stored[strangers[0]].file}: {strangers[0]}: got a tensor{_more(strangers, 'and')} that the model of "
            f"{CONFIG} does not have, expected none; give the config.json of this model"
        )
    for name, shape in expected.items():
        got = stored[name]
        if got.shape != shape:
            raise ValueError(
                f"{got.file}: {name}: got the shape {list(got.shape)}, expected {list(shape)} by {CONFIG}; give the "
                "config.json of this model"
            )
        if got.dtype not in shards.DTYPES:
            raise ValueError(
                f"{got.file}: {name}: got the dtype {got.dtype}, expected one of {', '.join(shards.DTYPES)}; fetch the "
                "model in one of these"
            )


def _more(names: list[str], word: str) -> str:
    return f" ({word} {len(names) - 1} more)" if len(names) > 1 else ""


def fill(params: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Read the values of parameters that have memory, tensor by tensor, into their dtype and device."""
    for name, p in params.items():
        shards.read_into(stored[name], p.data)


def check_vocabulary(size: int, config: Config, tokenizer: str, folder: Path) -> None:
    """Raises ValueError where a tokenizer has more tokens than the model; a model may have rows to spare."""
    if size > config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer}: got a vocabulary of {size}, expected at most {config.vocab_size}, that of the "
            f"model in {folder}; give the tokenizer that the model was trained with"
        )


def save(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    get: Callable[[str], Tensor],
    largest: int,
) -> list[str]:
    """Write a model into a folder that exists, in files of at most `largest` bytes or of one tensor, and an index where
    there are several; returns the files' names. `get` gives a tensor of these names and shapes when its turn comes."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    held = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if parts[-1] and held + size > largest:
            parts.append({})
            held = 0
        parts[-1][name] = shape
        held, total = held + size, total + size
    several = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    names = several if len(parts) > 1 else [SINGLE]
    for name, part in zip(names, parts, strict=True):
        shards.write(folder / name, part, dtype, get)
    if len(parts) > 1:
        where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        names = [*names, INDEX]
    _write(folder / CONFIG, {**config, "dtype": str(dtype).removeprefix("torch.")})
    return [*names, CONFIG]


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: is not there; give a folder with a model as Hugging Face publishes it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({' '.join(str(error).split())}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got a {type(content).__name__}, expected an object; fetch it again")
    return content
