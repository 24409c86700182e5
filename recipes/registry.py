"""The recipes that train, by the name that their checkpoints have; and how a config comes back from what was saved."""

import dataclasses
import importlib
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint import Checkpoint, CheckpointError, Reader
from engine.terminal.command import another, pasted
from optimizers.contract import UsageError

from .config import TrainConfig

CONFIGS = {  # a recipe's name in a checkpoint -> its module and class
    "baseline": ("baseline", "Baseline"),
    "baseline-glue": ("baseline", "Glue"),
    "baseline-gpt2": ("baseline", "Gpt2"),
    "baseline-masked": ("baseline", "Masked"),
    "baseline-resnet": ("baseline", "Resnet"),
    "baseline-vit": ("baseline", "Vit"),
    "finetune": ("finetune", "Finetune"),
    "lora": ("lora", "Lora"),
    "omgd": ("omgd", "Pretrain"),
    "omgd-glue": ("omgd", "Glue"),
    "omgd-gpt2": ("omgd", "Gpt2"),
    "omgd-resnet": ("omgd", "Resnet"),
    "omgd-vit": ("omgd", "Vit"),
    "rso": ("rso", "Rso"),
    "rso-glue": ("rso", "Glue"),
    "snsm": ("snsm", "Snsm"),
    "snsm-vit": ("snsm", "Vit"),
    "sumo": ("sumo", "Sumo"),
    "sumo-glue": ("sumo", "Glue"),
    "sumo-condition": ("sumo", "Condition"),
}


PLACED = ("out", "resume", "compile")  # where and how a run ran, which does not come back


def config_class(name: str) -> type[TrainConfig]:
    """The config of the recipe of this name. Raises KeyError where there is none."""
    module, kind = CONFIGS[name]
    found: type[TrainConfig] = getattr(importlib.import_module(f".{module}", __package__), kind)
    return found


def parsed(command: Sequence[str], flag: str) -> TrainConfig:
    """The config of "recipe and its flags", as its command line gives it; `flag` is where the words came from: a flag,
    or where they are a command line of their own, its program.

    Raises UsageError where that is no recipe that trains a model, or its flags cannot be read; --help ends the process.
    """
    recipe, *flags = [*command] or [""]
    quoted = flag.startswith("-")
    said = f"{flag}: " if quoted else ""
    if recipe not in {module for module, _ in CONFIGS.values()}:
        known = ", ".join(dict.fromkeys(module for module, _ in CONFIGS.values()))
        example = "snsm demo --rank 48" if quoted else f"{flag} snsm demo --rank 48"
        raise UsageError(
            f"{said}got {recipe!r}, expected a recipe and its flags, such as {example!r}; recipes: {known}"
        )
    try:
        program = pasted(*another(f"recipes.{recipe}")) if quoted else f"{flag} {recipe}"
        config = importlib.import_module(f".{recipe}", __package__).parse(flags, program)
        if not isinstance(config, TrainConfig):
            raise UsageError(f"{' '.join(command)!r} trains no model; name a recipe that does")
        config.check()
    except UsageError as error:
        raise UsageError(f"{said}{error}") from None
    return config


def words(text: str, flag: str) -> list[str]:
    """A quoted "recipe and its flags" as words. Raises UsageError where a quotation is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{flag}: got {text!r}: {str(error).lower()}") from None


def trained_by(saved: Checkpoint | Reader) -> TrainConfig:
    """The config that a checkpoint was trained with. Raises CheckpointError where it does not say."""
    try:
        plain = saved.trainer["config"]
        return from_plain(config_class(plain["recipe"]), plain)
    except (LookupError, TypeError, ValueError) as error:
        raise unknown(saved.path, error) from None


def unknown(path: Path, why: Exception) -> CheckpointError:
    """For a checkpoint whose optimizer cannot be rebuilt."""
    said = " ".join(f"{type(why).__name__}: {why}".split())
    return CheckpointError(
        f"{path}: was trained by a recipe, or with settings, that this version does not know ({said[:200]}); its "
        "optimizer's state cannot be read as another's"
    )


def from_plain(kind: type[TrainConfig], plain: Mapping[str, Any]) -> TrainConfig:
    """A config from what `TrainConfig.plain` made of it, but not where and how it ran. Raises TypeError where a value
    is of another type, and KeyError where its rule is not known."""
    options = plain.get("options")
    if not isinstance(options, Mapping):
        raise TypeError(
            "no options: saved before a rule's settings were kept apart; train a step with --resume under its own "
            "optimizer, then swap that"
        )
    family = kind.rules()[decode(str, plain.get("optimizer"), "optimizer")]
    if unknown := options.keys() - {f.name for f in _fields(family.options)}:
        raise TypeError(f"options: got {sorted(unknown)[:3]}, which {family.name} does not have")
    shared = {k: v for k, v in plain.items() if k not in (*PLACED, "options")}
    found = typing.cast(TrainConfig, decode(kind, shared, kind.__name__))
    return dataclasses.replace(found, options=decode(family.options, options, "options"))


def decode(kind: Any, value: Any, name: str) -> Any:
    """`value`, as JSON gives it, as an instance of the annotation `kind`. Raises TypeError, which says `name`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for one in inner:
            try:
                return decode(one, value, name)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else [*inner]
        if len(kinds) == len(value):
            return tuple(decode(one, own, name) for one, own in zip(kinds, value, strict=True))
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        types_of = typing.get_type_hints(kind)
        own = {f.name: decode(types_of[f.name], value[f.name], f.name) for f in _fields(kind) if f.name in value}
        return typing.cast(Any, kind)(**own)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif (kind is float and type(value) is int) or (isinstance(kind, type) and type(value) is kind):
        return value
    raise TypeError(f"{name}: got {value!r}, expected {getattr(kind, '__name__', kind)}")


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
