"""Weights of an encoder from a folder as Hugging Face publishes it, whatever head it was published with.

    found = sources(model, folder)          which tensor of the folder fills which parameter, and what is to be drawn
    fill(params, model, found, seed)        a tensor at a time

Names of a bare model lack the prefix of those with a head; old files say gamma and beta where we say weight and bias.
The body must be there as a whole. A head, and BERT's pooler, are drawn where the folder has none of this kind. Errors
are ValueError in one line: the file, the tensor, what was got, what was expected, and what to do.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import shards, weights
from .encoder import Encoder
from .encoder_config import EncoderConfig, Head, is_encoder
from .shards import Stored

OLD = {".gamma": ".weight", ".beta": ".bias"}
BUFFERS = ".position_ids"  # that old files hold beside the weights


class Described(Protocol):
    """A config that names the prefix of the body."""

    @property
    def model_type(self) -> str: ...


class Fillable(Protocol):
    """A body under its model_type, and a head beside it."""

    @property
    def config(self) -> Described: ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def init_weights(self, seed: int, names: frozenset[str] | None = None) -> None: ...


class Sources(NamedTuple):
    """Where the parameters come from."""

    stored: dict[str, Stored]  # by the parameter's name
    drawn: tuple[str, ...]  # parameters that the folder does not have
    unused: tuple[str, ...]  # tensors of the folder that this model has no place for: another head


def published(folder: Path) -> bool:
    """Is there an encoder's config.json?"""
    try:
        return is_encoder(json.loads((folder / weights.CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def config_of(folder: Path, head: Head | None = None, labels: tuple[str, ...] = ()) -> EncoderConfig:
    """The shape of the model in a folder, with its own head or another one. Raises ValueError."""
    try:
        found = EncoderConfig.from_hf(weights.read_json(folder / weights.CONFIG))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from None
    return found if head is None else replace(found, head=head, labels=labels)


def empty(config: EncoderConfig) -> Encoder:
    """A model without memory."""
    with torch.device("meta"):
        return Encoder(config)


def load(folder: Path, head: Head | None = None, labels: tuple[str, ...] = (), seed: int = 0) -> Encoder:
    """The model in a folder, in float32, on the host and in evaluation mode. Raises ValueError."""
    model = empty(config_of(folder, head, labels))
    found = sources(model, folder)
    model.allocate("cpu")
    fill(dict(model.named_parameters()), model, found, seed)
    return model.eval()


def sources(model: Fillable, folder: Path, new_head: bool = False) -> Sources:
    """What fills the model, from the heads of files alone; with `new_head` the folder's own head is not used.

    Raises ValueError where the folder lacks a tensor of the body, has one too many, or one of another shape."""
    kind = model.config.model_type
    stored = {_named(name): tensor for name, tensor in weights.tensors_of(folder).items() if not name.endswith(BUFFERS)}
    if not any(name.startswith(f"{kind}.") for name in stored):
        heads = ("cls.", "lm_head.", "classifier.")
        stored = {name if name.startswith(heads) else f"{kind}.{name}": tensor for name, tensor in stored.items()}
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if name.rpartition(".")[2] not in "PB"}
    body = {name for name in (*expected, *stored) if name.startswith(f"{kind}.") and ".pooler." not in name}
    if missing := [name for name in expected if name in body and name not in stored]:
        raise ValueError(
            f"{folder}: {missing[0]}: got no such tensor ({len(missing)} are missing), expected "
            f"{list(expected[missing[0]])} by {weights.CONFIG}; give the config.json of this model"
        )
    if strangers := [name for name in stored if name in body and name not in expected]:
        raise ValueError(
            f"{stored[strangers[0]].file}: {strangers[0]}: got a tensor that the model of {weights.CONFIG} does not "
            "have, expected none; give the config.json of this model"
        )
    wanted = {name: shape for name, shape in expected.items() if name in stored and (name in body or not new_head)}
    for name, shape in wanted.items():
        _fits(name, shape, stored[name], name in body)
    drawn = tuple(name for name in expected if name not in wanted)
    return Sources({name: stored[name] for name in wanted}, drawn, tuple(n for n in stored if n not in wanted))


def _named(name: str) -> str:
    for old, new in OLD.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _fits(name: str, shape: tuple[int, ...], got: Stored, body: bool) -> None:
    if got.shape != shape:
        way = "give the config.json of this model" if body else "this head was made for others: draw a new one"
        raise ValueError(f"{got.file}: {name}: got the shape {list(got.shape)}, expected {list(shape)}; {way}")
    if got.dtype not in shards.DTYPES:
        known = ", ".join(shards.DTYPES)
        raise ValueError(f"{got.file}: {name}: got the dtype {got.dtype}, expected one of {known}; fetch another one")


def fill(params: Mapping[str, Tensor], model: Fillable, found: Sources, seed: int) -> None:
    """Read values into the model's parameters, which have memory, and draw those that the folder does not have."""
    for name, tensor in found.stored.items():
        shards.read_into(tensor, params[name].data)
    model.init_weights(seed, frozenset(found.drawn))


def save(folder: Path, model: Encoder, **also: Any) -> None:
    """Write a model in float32 into a folder that exists; `also` goes into its config.json."""
    params = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    weights.save(folder, {**model.config.to_hf(), **also}, shapes, torch.float32, params.__getitem__, 2**40)
