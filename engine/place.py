"""Where a run lives: its device, its folder, and the checkpoint that it goes on from."""

from collections.abc import Callable
from pathlib import Path

import torch

from optimizers.core import UsageError

from . import checkpoint
from .config import RunConfig


def device_of(name: str) -> torch.device:
    """The device of that name. Raises UsageError where it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name}: cannot be used here: {why}; give auto, cpu or cuda") from None
    return device


def place(config: RunConfig, stem: Path, say: Callable[[str], None] = print) -> tuple[Path, Path | None]:
    """The run's folder, by default a new one that begins with `stem`, and the checkpoint to continue from.

    Raises UsageError where the folder holds a run that is not asked for, or there is nothing to resume.
    """
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not (path / checkpoint.TRAINER).exists():
            found = newest(path, say)
            if found is None:
                raise UsageError(f"--resume: no whole checkpoint in {path}; give never, auto, a run or a step folder")
            path = found
        return Path(config.out or path.parent), path
    if config.out is None:
        if config.resume == "auto":
            return stem, newest(stem, say)
        tried = (stem if i == 1 else stem.with_name(f"{stem.name}-{i}") for i in range(1, 10_000))
        return next(p for p in tried if not p.exists()), None
    out = Path(config.out)
    if config.resume == "never" and checkpoint.latest(out).path:
        raise UsageError(f"--out {out} holds a run already; continue it with --resume auto or choose another")
    return out, newest(out, say) if config.resume == "auto" else None


def newest(out: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint in a run's folder; damaged ones are said and passed over."""
    found = checkpoint.latest(out)
    for path, why in found.damaged:
        say(f"skipping {path.name}: {why}")
    return found.path
