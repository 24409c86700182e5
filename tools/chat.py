"""Talking to a model: the template and the settings of generation that lie beside its tokenizer."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.chat.asking import asking
from engine.data.chat.template import ChatTemplate, load_template
from engine.data.ending import read_beside
from engine.data.tokenizer import KEPT, Tokenizer
from models import weights

GENERATION = "generation_config.json"


class Settings(NamedTuple):
    """Of generation."""

    temperature: float
    top_k: int
    top_p: float
    ends: tuple[int, ...]
    """Any of these ends an answer."""


def beside(folder: Path, tokenizer: str | None) -> Path:
    """Where the template of a checkpoint or a published model lies."""
    if tokenizer is not None:
        given = Path(tokenizer).expanduser()
        return given if given.is_dir() else given.parent
    return folder if weights.is_folder(folder) and not (folder.parent / KEPT).is_dir() else folder.parent / KEPT


def template_of(folder: Path) -> ChatTemplate:
    """Raises ValueError where there is none."""
    found = load_template(folder)
    if found is None:
        raise ValueError(f"--chat: {folder} has no chat template; leave --chat out, or give --tokenizer with one")
    return found


def settings(folder: Path, tokenizer: Tokenizer) -> Settings:
    """What the model's publisher says of generation, and of every other thing what is usual here."""
    said: Mapping[str, Any] = read_beside(folder, GENERATION)
    ends = said.get("eos_token_id")
    known = [ends] if isinstance(ends, int) else [i for i in ends or [] if isinstance(i, int)]
    usual = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}
    found = {name: said[name] if isinstance(said.get(name), int | float) else value for name, value in usual.items()}
    greedy = said.get("do_sample") is False
    temperature = 0.0 if greedy else float(found["temperature"])
    together = tuple(dict.fromkeys([tokenizer.eos, *known]))
    return Settings(temperature, int(found["top_k"]), float(found["top_p"]), together)


def converse(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str,
    first: str,
    answer: Callable[[list[int]], Iterator[int]],
    stream: Callable[[Iterator[int]], Iterator[str]],
) -> None:
    """Answer `first`, or without it line after line of the input until it ends, each knowing those before it.

    Raises ValueError where the template refuses a message or the conversation is longer than the model.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for said in [first] if first else _lines():
        messages.append({"role": "user", "content": said})
        parts = []
        for piece in stream(answer(asking(tokenizer, template, messages, "--chat"))):
            parts.append(piece)
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(parts)})


def _lines() -> Iterator[str]:
    """What is typed, without empty lines; a mark invites where somebody watches."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
