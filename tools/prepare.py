"""Turn text into tokens once, for any number of runs: `python -m tools.prepare OUT --data PATH... --tokenizer SPEC`.

With --chat the rows are conversations: they are put into the checkpoint's chat template, and answers are trained.

An interrupted run goes on where it was when it is started again; a finished one returns at once.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from engine.data import read_index, tokenizer_of
from engine.data.chat import prepare as chat
from engine.data.chat.packing import Longer, Packed
from engine.data.chat.reader import Examples
from engine.data.chat.request import ChatRequest, looks_like_chat
from engine.data.chat.show import show
from engine.data.losses import several
from engine.data.prepare import prepare
from engine.data.request import Request
from engine.terminal.flags import ask
from engine.terminal.output import printable
from engine.terminal.progress import Bar
from optimizers.contract import UsageError


@dataclass(frozen=True)
class Prepare:
    """Turn text or conversations into tokens, once."""

    out: tyro.conf.Positional[Path]
    """The folder to make."""
    chat: bool = False
    """The rows are conversations, or prompts and what to answer; also found from their keys."""
    show: int = 0
    """Print so many examples with what is trained in colour, or in brackets where there is no colour."""
    sequence: int | None = None
    """Say how examples fit into rows of so many tokens."""
    longer: Longer = "refuse"
    """With --sequence: what becomes of examples that are longer."""
    request: Annotated[ChatRequest, tyro.conf.arg(name="")] = field(default_factory=ChatRequest)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    printable()
    bar = Bar(Console(markup=False, emoji=False))
    try:
        config = ask(lambda prog: tyro.cli(Prepare, prog=prog, args=arguments, description=__doc__))
        chats = config.chat or _found(config, bar)
        if not chats:
            _refuse_flags_of_chats(config)
        config.out.mkdir(parents=True, exist_ok=True)
        with bar.progress:
            out = chat.prepare(config.out, config.request, bar) if chats else prepare(config.out, config.request, bar)
        index = read_index(out)
        if chats:
            _show(config, out, bar)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        file = "" if error.filename in (None, str(config.out)) else f" ({error.filename})"
        what = f"OUT {config.out}: cannot be made: {error.strerror or error}{file}"
        print(f"error: {what}; make room, or name another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for split, made in index["splits"].items():
        parts = (made["tokens"], "token"), (made["documents"], "example" if chats else "document")
        line = ", ".join(several(count, thing) for count, thing in (*parts, (len(made["shards"]), "file")))
        bar(f"{split}: {line}" + (f"; {several(made['trained'], 'token')} trained" if chats else ""), 0, 0)
    bar(f"{out}: ready ({index['tokenizer']['fingerprint']}, vocabulary {index['tokenizer']['vocab_size']:,})", 0, 0)
    return 0


def _found(config: Prepare, bar: Bar) -> bool:
    """Are the rows conversations by their keys? Says so."""
    found = bool(config.request.data) and looks_like_chat(config.request)
    if found:
        bar("the rows are conversations by their keys: --chat", 0, 0)
    return found


def _refuse_flags_of_chats(config: Prepare) -> None:
    """Raises UsageError for a flag that would change nothing."""
    own = {f.name for f in fields(ChatRequest)} - {f.name for f in fields(Request)}
    given = [f.name for f in fields(ChatRequest) if f.name in own and getattr(config.request, f.name) != f.default]
    given += [name for name in ("show", "sequence") if getattr(config, name)]
    given += ["longer"] if config.longer != "refuse" else []
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')}: says something of conversations only; add --chat")


def _show(config: Prepare, out: Path, bar: Bar) -> None:
    """Some examples with their masks, and how all fit into rows. Raises UsageError."""
    if config.longer != "refuse" and config.sequence is None:
        raise UsageError(f"--longer {config.longer}: says what becomes of what is longer than --sequence; give it")
    train = Examples(out)
    for k in range(min(config.show, len(train))):
        show(bar.console, tokenizer_of(out), train, k)
    for examples in (train, Examples(out, "validation")) if config.sequence is not None else ():
        assert config.sequence is not None
        bar(f"{examples.split}: {Packed(examples, config.sequence, longer=config.longer).in_words()}", 0, 0)


if __name__ == "__main__":
    sys.exit(main())
