"""Text from a checkpoint, as it is generated: `python -m tools.generate RUN --prompt "Once upon a time"`.

    python -m tools.generate RUN --chat                          talk: a line, an answer, until the input ends
    python -m tools.generate RUN --chat --prompt "Who are you?"  one answer

RUN may also be a folder with a model as Hugging Face publishes it, of a family that is known here.
Prints the prompt and its continuation, or with --chat the answers. Exit codes: 0 done, 1 failure, 2 bad arguments,
5 unusable checkpoint, 130 interrupted.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from engine.checkpoint import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    TRAINER,
    WEIGHTS,
    CheckpointError,
    Latest,
    load,
    restore_into,
)
from engine.data.prompt import prompt_ids
from engine.data.tokenizer import KEPT, Tokenizer, load_tokenizer
from engine.terminal.flags import ask
from engine.terminal.output import printable
from models import weights
from models.sampling import generate
from models.weights import Model
from optimizers.wrappers.rso import merge

from . import chat
from .chat import Settings
from .source import newest


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a trained model."""

    run: tyro.conf.Positional[Path]
    """A run's folder, of which the newest whole checkpoint is used, one step-* folder, or a Hugging Face folder."""
    prompt: str = ""
    """What to continue. Empty: start a new document."""
    max_new_tokens: int = 256
    """Stop after so many tokens, or at the end of the document, or at the model's last position."""
    temperature: float | None = None
    """Below 1 is more predictable, above 1 less; 0 always takes the likeliest token. Default: 0.8, or with --chat what
    the model's generation_config.json says."""
    top_k: int | None = None
    """Draw among the k likeliest tokens; 0, the default: among all. With --chat as above."""
    top_p: float | None = None
    """Draw among the fewest tokens that hold this much probability; 1, the default: among all. With --chat as above."""
    chat: bool = False
    """Put --prompt, or line after line of the input, into the model's chat template, and print answers alone."""
    system: str = ""
    """With --chat: what the system says first."""
    seed: int = 0
    """The same seed gives the same text."""
    checkpoint: int | None = None
    """The step to use instead of the newest."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not in the run's folder."""
    eos: str | None = None
    """With --tokenizer: the token, or its id, that ends a document, if not the one that the files beside it name."""
    device: str | None = None
    """Default: cuda if there is one, else cpu."""


def find(run: Path, step: int | None) -> Latest:
    """The checkpoint folder that RUN and --checkpoint mean; damaged ones that are passed over are named on stderr.

    Raises ValueError where there is none, CheckpointError where none is whole.
    """
    if step is not None:
        folder = run / f"step-{step:08d}"
        if not folder.is_dir():
            there = ", ".join(str(int(p.name[5:])) for p in sorted(run.glob("step-*")) if p.name[5:].isdigit())
            raise ValueError(f"--checkpoint: got {step}, expected one of the steps in {run}: {there or 'it has none'}")
        return Latest(folder, [])
    if (run / MODEL).is_file() or published(run):
        return Latest(run, [])
    return newest(run, "RUN")


def published(folder: Path) -> bool:
    """Is it a folder as Hugging Face publishes models, and not a checkpoint of ours?"""
    return weights.is_folder(folder) and not (folder / TRAINER).is_file()


def load_model(folder: Path, device: torch.device, record: dict[str, Any] | None = None) -> Model:
    """The model in a checkpoint or Hugging Face folder, in the dtype it was saved in; `record` is what `verify` gave of
    it, where that was asked already. Raises CheckpointError where it is not whole, ValueError where Hugging Face's
    is not."""
    if published(folder):
        return weights.load(folder, device=device)
    try:
        config = weights.parsed(_read_json(folder / CONFIG))
        if in_products(folder):
            saved = load(folder, record)
            tensors = merge(saved.params, saved.state)
        else:
            tensors = load_file(folder / MODEL)
    except (ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    model = weights.empty(config)
    model.to(next(iter(tensors.values())).dtype).to_empty(device=device)
    restore_into(dict(model.named_parameters()), tensors)
    return model.eval()


def in_products(folder: Path) -> bool:
    """Does the checkpoint, an old one, keep B Pᵀ of RSO beside the weights? The model's file has it otherwise."""
    if not (folder / OPTIMIZER).is_file() or (folder / WEIGHTS).is_file():
        return False
    with safe_open(folder / OPTIMIZER, framework="pt") as content:
        return (content.metadata() or {}).get("rso.form") == "products"


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with: the run's own copy if it has one, else what its config names; or
    the one beside a published model."""
    if published(folder):
        return load_tokenizer(str(folder))
    if (folder.parent / KEPT).is_dir():
        return load_tokenizer(str(folder.parent / KEPT))
    config = _read_json(folder / TRAINER).get("config")
    spec, eos = (config.get("tokenizer"), config.get("eos")) if isinstance(config, dict) else (None, None)
    if not isinstance(spec, str):
        raise CheckpointError(f"{folder / TRAINER}: config.tokenizer: got {spec!r}, expected a text; give --tokenizer")
    return load_tokenizer(spec, eos)


def opening(folder: Path) -> list[int]:
    """The tokens that the tokenizer of a published model puts before every text, such as Llama 3's begin of text.

    A run of ours has none: in training nothing stood there."""
    file = folder / "tokenizer.json"
    if not published(folder) or not file.is_file():
        return []
    return list(tokenizers.Tokenizer.from_file(str(file)).encode("").ids)


def text(ids: Sequence[int], new: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of `ids` and then of `new`, in pieces that add up to the whole.

    Tokens may hold parts of a character: what decodes to U+FFFD at the end is held back until more tokens complete
    it. Everything is decoded together each time because a token's text can depend on those before it.
    """
    ids = list(ids)
    shown = decode(ids).rstrip("\ufffd")
    yield shown
    for token in new:
        ids.append(token)
        stable = decode(ids).rstrip("\ufffd")
        yield stable[len(shown) :]
        shown = max(shown, stable, key=len)
    yield decode(ids)[len(shown) :]


def main(argv: Sequence[str] | None = None) -> int:
    printable("replace")
    try:
        args = ask(lambda prog: tyro.cli(Generate, prog=prog, args=argv, description=__doc__))
        device = _device(args.device)
        found = find(args.run, args.checkpoint)
        folder = found.path
        assert folder is not None
        if args.eos is not None and args.tokenizer is None:
            raise ValueError("--eos: a run knows its own end token; give it with --tokenizer only")
        tokenizer = load_tokenizer(args.tokenizer, args.eos) if args.tokenizer else tokenizer_of(folder)
        model = load_model(folder, device, found.record)
        weights.check_vocabulary(tokenizer.vocab_size, model.config, tokenizer.name, folder)
        if args.system and not args.chat:
            raise ValueError("--system: says something with --chat only; add it")
        (_chat if args.chat else _continue)(args, folder, model, tokenizer)
    except KeyboardInterrupt:
        print()
        return 130
    except CheckpointError as error:
        return _fail(error, 5)
    except (ValueError, OSError) as error:  # a path that cannot be looked at
        return _fail(error, 2)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        return _fail(error, 1)
    return 0


def _continue(args: Generate, folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """The prompt and what follows it. Raises ValueError."""
    ids, remark = prompt_ids(tokenizer, args.prompt, model.config.max_position_embeddings)
    first = [] if args.tokenizer else opening(folder)
    ids = first + (ids if args.prompt or not first else [])
    if remark:
        print(remark, file=sys.stderr)
    new = _drawn(args, model, ids, Settings(0.8, 0, 1.0, (tokenizer.eos,)))
    for piece in text(ids, new, tokenizer.decode):
        print(piece, end="", flush=True)
    print()


def _chat(args: Generate, folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Answers. Raises ValueError."""
    where = chat.beside(folder, args.tokenizer)
    usual = chat.settings(where, tokenizer)
    chat.converse(
        tokenizer,
        chat.template_of(where),
        args.system,
        args.prompt,
        lambda ids: _drawn(args, model, ids, usual),
        lambda new: text([], new, tokenizer.decode),
    )


def _drawn(args: Generate, model: Model, ids: Sequence[int], usual: Settings) -> Iterator[int]:
    """New tokens, by the flags that are given and by what is usual."""
    asked = (args.temperature, args.top_k, args.top_p)
    temperature, top_k, top_p = (own if own is not None else other for own, other in zip(asked, usual[:3], strict=True))
    return generate(model, ids, args.max_new_tokens, temperature, int(top_k), top_p, args.seed, eos=usual.ends)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this device
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: got {name!r}, expected a device of this machine such as cpu: {reason}") from None
    return device


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: got a {type(content).__name__}, expected an object")
    return content


def _fail(error: Exception, code: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
