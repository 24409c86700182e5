"""Processes of their own that ask for a folder at the same instant and hold what they get."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from engine.checkpoint import lock
from optimizers.contract import UsageError

PATHS = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]


class Owner(NamedTuple):
    """A process that asks; it ends when it is sent anything."""

    process: ForkServerProcess
    pipe: Connection

    def answer(self) -> str:
        """ "owns …" or "refused …", once it knows."""
        assert self.pipe.poll(120)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join(60)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def owners(folder: Path, how: str, name: str, count: int, flocks: bool) -> Iterator[list[Owner]]:
    """That many which ask for `lock.how(name)` in `folder`. They are forked from one server that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = []
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(PATHS)):  # by which the server finds what it loads
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_ask, args=(theirs, folder, how, name, flocks), daemon=True)
            process.start()
            started.append(Owner(process, ours))
    try:
        assert all(one.answer() == "ready" for one in started)
        (folder / "go").touch()
        yield started
    finally:
        for one in started:
            one.kill()
        (folder / "go").unlink(missing_ok=True)


def _ask(pipe: Connection, folder: Path, how: str, name: str, flocks: bool) -> None:
    os.chdir(folder)
    if not flocks:
        lock._flocks = lambda folder: False
    pipe.send("ready")
    while not Path("go").exists():
        time.sleep(0.001)
    try:
        with getattr(lock, how)(Path(name)) as own:
            pipe.send(f"owns {own}")
            pipe.recv()
    except UsageError as error:
        pipe.send(f"refused {error}")
