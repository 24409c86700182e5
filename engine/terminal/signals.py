"""Signals that ask a process to end, heard politely: work in hand is finished and saved first.

SIGINT is Ctrl-C; SIGTERM and SIGHUP come from `kill` and a terminal that closes; SIGUSR1, SIGUSR2 and SIGXCPU from
batch systems before they take the machine back; SIGPWR from a power supply that runs dry; SIGQUIT is Ctrl-\\. One that
was ignored when the process began, as SIGHUP is under `nohup`, stays ignored; SIGINT does not, as shells ignore it for
jobs in the background. Python hears signals in its main thread only: elsewhere these do nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR", "SIGBREAK")
POLITE = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
KEYS = ("SIGINT", "SIGQUIT")  # somebody pressed a key; the others come in twos and threes when a machine is taken back


class Ended(BaseException):
    """A signal asked the process to end where there was nothing to finish. `code` is the exit code that says so."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: ended outside of training; whatever was saved before stays")
        self.signum, self.code = signum, 128 + signum


class Asked:
    """Whether a signal has asked for the end, and which."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def noted(say: Callable[[str], None]) -> Iterator[Asked]:
    """In the block, a signal is noted and said, for the block to look at. A key after that raises KeyboardInterrupt."""
    asked = Asked()

    def note(signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if asked:
            if name in KEYS:
                raise KeyboardInterrupt
            return
        asked.signum = signum
        with suppress(Exception):  # it may come in the middle of a line that is being printed
            say(f"{name}: saving after this step; Ctrl-C ends the run without saving")

    with _handled(note):
        yield asked


@contextmanager
def raised() -> Iterator[None]:
    """In the block, a signal raises, so that everything is tidied: SIGINT KeyboardInterrupt, any other Ended."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt if signum == signal.SIGINT else Ended(signum)

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for signum in POLITE:
        now = signal.getsignal(signum)
        if now is None or (now == signal.SIG_IGN and signum != signal.SIGINT):  # None: not set by Python
            continue
        before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, handler_before in before.items():
            signal.signal(signum, handler_before)
