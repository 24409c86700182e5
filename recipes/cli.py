"""From a command line to an exit code: what all recipes, and the tools that build runs, have in common.

Exit codes: 0 done, 1 failure, 2 bad arguments, 4 non-finite loss, 5 incompatible checkpoint, 130 interrupted and saved.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.checkpoint import CheckpointError
from engine.loop.trainer import Interrupted, NonFiniteError
from engine.terminal import output, paths, signals
from optimizers.contract import UsageError

Config = TypeVar("Config")


def main(parse: Callable[[Sequence[str] | None], Config], run: Callable[[Config], object]) -> None:
    """Parse the command line, run, and turn what can go wrong into one line and an exit code."""
    output.printable()
    with output.lasting(), signals.raised():
        try:
            run(parse(None))
        except UsageError as error:
            code, line = 2, f"error: {error}"
        except NonFiniteError as error:
            code, line = 4, f"error: {error}"
        except CheckpointError as error:
            code, line = 5, f"error: {error}"
        except (Interrupted, signals.Ended) as signal:
            code, line = signal.code, str(signal)
        except OSError as error:
            what = error.filename or "a file"
            code, line = paths.code(error), f"error: {what}: {error.strerror or error}; make room, or name another file"
        except KeyboardInterrupt:
            code, line = 130, "interrupted; nothing was saved after the last checkpoint"
        else:
            return
        print(line, file=sys.stderr)
        raise SystemExit(code)
