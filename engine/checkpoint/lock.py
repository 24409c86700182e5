"""A folder has one owner at a time, from its first second: `<folder>/.lock` says who, since when and by which command.

The system holds the lock (flock) and lets go of it however the process ends. On a filesystem without flock the file
alone is the lock; the owner's process is looked for, and where it cannot be (another machine, another container) the
file is watched: a living owner touches it every few seconds. A lock whose owner is gone is taken over.
"""

import contextlib
import errno
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from optimizers.contract import UsageError

from .process import Process, booted, this

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
BEAT = 5.0  # seconds between two touches of the file
PATIENCE = 1.0  # seconds for which a lock that says nothing is read again: its owner may be about to write it
WATCH = 30.0  # without one, an owner that cannot be looked for is gone
HERE: dict[tuple[int, int], int | None] = {}  # folders that this process owns, by device and inode -> what holds it
GUARD = threading.Lock()


def _forked() -> None:
    """A child owns nothing, and must not hold a lock after its parent has ended."""
    for descriptor in filter(None, HERE.values()):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    HERE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class InUse(UsageError):
    """Another process owns the folder."""


class Owner(NamedTuple):
    """What a lock says."""

    process: Process
    command: str
    since: float

    def __str__(self) -> str:
        when, seconds = datetime.fromtimestamp(self.since), max(time.time() - self.since, 0)
        age = next(
            (
                f"{seconds / n:.0f} {unit}"
                for unit, n in (("days", 86400), ("hours", 3600), ("minutes", 60))
                if seconds >= 2 * n
            ),
            f"{seconds:.0f} seconds",
        )
        host = self.process.host or "an unknown host"
        return f"process {self.process.pid} on {host} ({self.command}) since {when:%Y-%m-%d %H:%M:%S}, {age}"


class Claim:
    """A folder that this process owns, until `release`."""

    def __init__(self, folder: Path, made: list[Path], say: Callable[[str], None], name: str) -> None:
        self.folder, self.made, self._stop = folder, made, threading.Event()
        try:
            with GUARD:
                self._descriptor = _take(folder, say, name)
                about = folder.stat()
                self._key = about.st_dev, about.st_ino
                HERE[self._key] = self._descriptor
        except OSError as error:
            self._tidy()
            why = error.strerror or error
            raise UsageError(
                f"{name} {folder}: cannot be written: {why}; make room there or choose another folder"
            ) from None
        except BaseException:
            self._tidy()
            raise
        threading.Thread(target=_beat, args=(folder / FILE, self._stop), name="lock", daemon=True).start()

    def release(self) -> None:
        """Let go. Folders that were made for it and are empty still are removed."""
        self._stop.set()
        with GUARD, contextlib.suppress(OSError):
            if HERE.pop(self._key, None) is None and self._descriptor is not None:
                return  # this process was forked from the owner
            if (owner := _read(self.folder / FILE)) and owner.process == this():  # not taken over by another
                (self.folder / FILE).unlink()
            if self._descriptor is not None:
                os.close(self._descriptor)  # which also unlocks it
        self._tidy()

    def _tidy(self) -> None:
        for new in reversed(self.made):
            with contextlib.suppress(OSError):
                new.rmdir()


@contextmanager
def claim(folder: Path, say: Callable[[str], None] = print, name: str = "--out") -> Iterator[Path]:
    """Make `folder` where it is not there, and own it in the block. What was made and stays empty is removed again.

    Raises InUse where another process owns it, UsageError where it cannot be made or written; `name` is what the
    message calls it.
    """
    owned = Claim(folder, _make(folder, name), say, name)
    try:
        yield folder
    finally:
        owned.release()


@contextmanager
def claim_new(stem: Path, say: Callable[[str], None] = print) -> Iterator[Path]:
    """The same for a folder that was not there: `stem`, or `stem`-2, `stem`-3 ... : two that ask at once get two."""
    owned = None
    for i in range(1, 10_000):
        folder = stem if i == 1 else stem.with_name(f"{stem.name}-{i}")
        made = _make(folder.parent, "--out")
        try:
            folder.mkdir()
            owned = Claim(folder, [*made, folder], say, "--out")
            break
        except (FileExistsError, InUse):
            continue
        except OSError as error:
            raise _cannot(folder, "--out", error) from None
    if owned is None:
        raise UsageError(f"{stem}: there are 9999 of them; delete some or give --out a folder")
    try:
        yield owned.folder
    finally:
        owned.release()


def _make(folder: Path, name: str) -> list[Path]:
    """Make a folder; returns those that were missing on the way, outermost first. Raises UsageError."""
    missing: list[Path] = []
    try:
        for path in (folder, *folder.parents):
            if path.is_dir():
                break
            missing.insert(0, path)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot(folder, name, error) from None
    return missing


def _cannot(folder: Path, name: str, error: OSError) -> UsageError:
    return UsageError(f"{name} {folder}: cannot be made: {error.strerror or error}; choose another folder")


def _take(folder: Path, say: Callable[[str], None], name: str) -> int | None:
    """The lock, with this process's name in it; returns the descriptor that holds it. Raises InUse, OSError."""
    file = folder / FILE
    if not _flocks(folder):
        _take_by_file(file, say, name)
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise _in_use(folder, _read(file, patient=True), name) from None
            there = file.stat() if file.exists() else None
            if there is None or there.st_ino != os.fstat(descriptor).st_ino:
                os.close(descriptor)  # its owner has just ended and removed it
                continue
            if (owner := _read(file)) is not None and owner.process != this():
                lives = owner.process.lives
                if lives or (lives is None and _touched(file, owner, say)):
                    raise _in_use(folder, owner, name)
                say(f"{folder} was owned by {owner}; that is gone, and the folder is taken over")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _record(), 0)
            os.fsync(descriptor)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _take_by_file(file: Path, say: Callable[[str], None], name: str) -> None:
    """The same where the filesystem has no flock: whoever makes the file owns the folder."""
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            owner = _read(file, patient=True)
            about = file.parent.stat()
            if owner and owner.process == this() and (about.st_dev, about.st_ino) not in HERE:
                return  # since before this process became another program
            lives = owner.process.lives if owner else None
            if lives or (lives is None and _touched(file, owner, say)):
                raise _in_use(file.parent, owner, name) from None
            aside = file.with_name(f"{FILE}-{os.getpid()}")
            try:
                file.rename(aside)
            except FileNotFoundError:
                continue
            if (found := _read(aside)) != owner:  # another was faster: that one is its lock
                with contextlib.suppress(OSError):
                    os.link(aside, file)
                aside.unlink()
                raise _in_use(file.parent, found, name) from None
            aside.unlink()
            say(
                f"{file.parent} was owned by {owner or 'nobody that says its name'}; that is gone, and it is taken over"
            )
            continue
        with os.fdopen(descriptor, "wb") as content:
            content.write(_record())
            content.flush()
            os.fsync(content.fileno())
        return


def _flocks(folder: Path) -> bool:
    """Does the filesystem know flock? Raises OSError where it takes no file at all."""
    probe = folder / f"{FILE}-probe-{os.getpid()}-{threading.get_ident()}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        if os.write(descriptor, b"\0" * 4096) < 4096:  # a full disk makes files, and takes little or nothing in them
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        if fcntl is None:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    finally:
        os.close(descriptor)
        probe.unlink()
    return True


def _touched(file: Path, owner: Owner | None, say: Callable[[str], None]) -> bool:
    """Does an owner that cannot be looked for still touch its lock?"""

    def moment() -> tuple[int, bytes]:
        with file.open("rb") as content:  # opening asks a server anew
            return os.fstat(content.fileno()).st_mtime_ns, content.read()

    with contextlib.suppress(OSError):
        first, end = moment(), time.monotonic() + WATCH
        if owner and owner.process.host == this().host and first[0] < booted() * 1e9:
            return False  # this machine has been started since
        say(f"{file.parent} is owned by {owner or 'somebody'}; watching for {WATCH:.0f} seconds whether that is alive")
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH / 10))
            if moment() != first:
                return True
    return False


def _beat(file: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)


def _record() -> bytes:
    command = " ".join(shlex.join(["python", *sys.orig_argv[1:]]).split())
    command = command if len(command) <= 160 else f"{command[:160]}…"
    content = {"process": this()._asdict(), "command": command, "since": time.time()}
    return (json.dumps(content, indent=1) + "\n").encode()


def _read(file: Path, patient: bool = False) -> Owner | None:
    """Who a lock names; None where it names nobody. With `patient`, wait a little for an owner about to write it."""
    for _ in range(max(1, round(PATIENCE / 0.05)) if patient else 1):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return Owner(Process(**content["process"]), str(content["command"]), float(content["since"]))
        if patient:
            time.sleep(0.05)
    return None


def _in_use(folder: Path, owner: Owner | None, name: str) -> InUse:
    who = str(owner) if owner else "a process that does not say its name"
    end = f"end it (kill {owner.process.pid})" if owner else "end it"
    return InUse(f"{name} {folder}: in use by {who}; wait until it is done, {end}, or choose another folder")
