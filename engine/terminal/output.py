"""Standard output that knows few characters, or goes away: a terminal that closes, `| head`, a log on a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


def printable(errors: str = "backslashreplace") -> None:
    """Let nothing that is printed from here on fail for what the terminal cannot show: every command calls this first.

    A model may say anything, a path may be no Unicode, a table has lines, and a terminal may know ASCII only.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


class Lasting:
    """A text stream that a failing write does not end: it is said once on stderr, and what follows goes nowhere.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._gone(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._gone(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _gone(self, error: OSError) -> None:
        """From here on the descriptor leads nowhere, for what Python still holds for it too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        what = f"warning: the output takes no more ({error.strerror or error}); the run goes on without it, its numbers"
        with suppress(OSError, ValueError, AttributeError):  # nobody may be left to tell
            print(f"{what} are in metrics.jsonl", file=sys.__stderr__, flush=True)


@contextmanager
def lasting() -> Iterator[None]:
    """In the block, nothing that is printed can fail for want of a reader; streams that were closed lead nowhere."""
    before = sys.stdout, sys.stderr
    with ExitStack() as opened:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is None:  # the process was started with the descriptor closed
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            setattr(sys, name, Lasting(stream))
        try:
            yield
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = before
