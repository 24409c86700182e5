"""Turn text into tokens once, for any number of runs: `python -m tools.prepare OUT --data PATH... --tokenizer SPEC`.

An interrupted run goes on where it was when it is started again; a finished one returns at once.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from engine.data import read_index
from engine.data.losses import several
from engine.data.prepare import prepare
from engine.data.request import Request
from engine.terminal.flags import ask
from engine.terminal.output import printable
from engine.terminal.progress import Bar
from optimizers.contract import UsageError


@dataclass(frozen=True)
class Prepare:
    """Turn text into tokens, once."""

    out: tyro.conf.Positional[Path]
    """The folder to make."""
    request: Annotated[Request, tyro.conf.arg(name="")] = field(default_factory=Request)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    printable()
    bar = Bar(Console(markup=False, emoji=False))
    try:
        config = ask(lambda prog: tyro.cli(Prepare, prog=prog, args=arguments, description=__doc__))
        config.out.mkdir(parents=True, exist_ok=True)
        with bar.progress:
            out = prepare(config.out, config.request, bar)
        index = read_index(out)
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
        parts = (made["tokens"], "token"), (made["documents"], "document"), (len(made["shards"]), "file")
        bar(f"{split}: {', '.join(several(count, thing) for count, thing in parts)}", 0, 0)
    bar(f"{out}: ready ({index['tokenizer']['fingerprint']}, vocabulary {index['tokenizer']['vocab_size']:,})", 0, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
