"""Process identity: number and start time, as systems give numbers again; and whether such a process still runs."""

import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process among all that ever ran on any machine."""

    pid: int
    started: str  # what the system says of its start; empty where it does not say
    place: str  # the machine since it was last started, and the container: where `pid` means something
    host: str

    @property
    def lives(self) -> bool | None:
        """None where that cannot be told from here: it ran on another machine, in another container, before a boot."""
        if self.place != _place():
            return None
        if self.started:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # somebody else's
        return True


def this() -> Process:
    """The process that asks."""
    return Process(os.getpid(), _started(os.getpid()), _place(), socket.gethostname())


def booted() -> float:
    """When this machine was started, in seconds since 1970; 0 where it does not say."""
    return next((float(line[6:]) for line in _text("/proc/stat").splitlines() if line.startswith("btime ")), 0.0)


def _started(pid: int) -> str:
    """In ticks after the boot. Empty where there is no such process, or none is shown. One that has ended is none."""
    after = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a command's name may hold spaces
    return after[19] if len(after) > 19 and after[0] not in "ZX" else ""


def _place() -> str:
    boot = _text("/proc/sys/kernel/random/boot_id").strip()
    if not boot:  # on Windows a signal of 0 would end the process: nothing can be told
        return "" if sys.platform == "win32" else socket.gethostname()
    try:
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return boot


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
