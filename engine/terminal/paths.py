"""Files that a command is to write, looked at before the work is done whose result they hold."""

import errno
import os
from pathlib import Path

from optimizers.contract import UsageError

NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)  # the name is wrong, not the disk


def code(error: OSError) -> int:
    """The exit code for a file that cannot be used: 2 where another name is needed, else 1."""
    return 2 if error.errno in NAMES else 1


def writable(path: Path, name: str) -> Path:
    """Raises UsageError, which calls the path `name`, where no file can be written there. Leaves nothing behind."""
    try:
        if path.is_dir():
            raise UsageError(f"{name} {path}: is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"{name} {path}: its folder {path.parent} is not there; make it, or name another file")
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{name} {path}: is a link to nowhere; remove it, or name another file")
        if path.is_char_device():  # such as /dev/full
            with path.open("wb", buffering=0) as device:
                device.write(b"\n")
        elif path.exists():
            with path.open("r+b"):
                pass
        else:
            path.touch()  # the name may be one that the filesystem does not take
            path.unlink()
        if path.is_file() or not path.exists():
            _room(path.with_name(f".probe-{os.getpid()}"))
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"{name} {path}: cannot be written: {why}; make room, or name another file") from None
    return path


def _room(probe: Path) -> None:
    """Raises OSError where the disk is full: it makes files then, and takes nothing in them."""
    try:
        with probe.open("wb", buffering=0) as file:
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
