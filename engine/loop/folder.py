"""The folder of a run, its device, and the checkpoint that it continues from."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from optimizers.contract import UsageError

from .. import checkpoint
from ..checkpoint import Reader
from ..checkpoint.aside import METRICS, set_aside
from ..checkpoint.form import steps
from ..checkpoint.lock import claim, claim_new
from ..config import RunConfig

RUN = {"steps", "micro_batch", "seed"}  # what the config.json of a run says


def device_of(name: str) -> torch.device:
    """The device of that name. Raises UsageError where it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name}: cannot be used here: {why}; give auto, cpu or cuda") from None
    return device


@contextmanager
def place(
    config: RunConfig,
    stem: Path,
    say: Callable[[str], None] = print,
    dry: bool = False,
    given: Reader | None = None,
) -> Iterator[tuple[Path, Reader | None]]:
    """The run's folder, owned in the block, and the checkpoint to continue from. Without `config.out` the folder is a
    new one whose name begins with `stem`. A `dry` run owns nothing and leaves nothing. `given` is the checkpoint that
    `config.resume` names, where it is open already.

    Raises UsageError where another process owns it, it holds a run that is not asked for, or nothing can be resumed.
    """
    folder = str(config.out or config.resume)
    if any("\ud800" <= character <= "\udfff" for character in folder):
        raise UsageError(f"--out {folder}: a name that is not UTF-8, which TensorBoard cannot write to; choose another")
    out = Path(config.out).expanduser() if config.out else None
    if given is None and config.resume not in ("never", "auto"):
        given = _asked(Path(config.resume).expanduser(), say)
    out = out or (given.path.parent if given else stem if config.resume == "auto" else None)
    if out:
        _check_foreign(out)
    if dry:
        yield out or stem, given or (newest(out, say) if out and config.resume == "auto" else None)
        return
    with claim(out, say) if out else claim_new(stem, say) as owned:
        saved = given or newest(owned, say)
        if saved and config.resume == "never":
            raise UsageError(f"--out {owned} holds a run already; continue it with --resume auto or choose another")
        if saved and saved.step > config.steps:
            raise UsageError(
                f"--steps {config.steps}: {saved.path} has done {saved.step} already; give more, or an earlier step "
                "folder to --resume"
            )
        yield owned, saved


def _asked(path: Path, say: Callable[[str], None]) -> Reader:
    """The checkpoint that --resume names: a step folder, or the newest in a run's. Raises UsageError where there is
    none, CheckpointError where none is whole."""
    if os.path.exists(path / checkpoint.TRAINER):
        return checkpoint.read(path)
    if (found := newest(path, say)) is not None:
        return found
    if damaged := steps(path):
        raise checkpoint.CheckpointError(f"--resume: none of the {len(damaged)} checkpoints in {path} is whole")
    if not path.exists():
        there = ", ".join(step.name for step in steps(path.parent)) if path.parent.name else ""
        what = f"{path} is not there" + (f"; {path.parent} has {there}" if there else "")
    else:
        what = f"no checkpoint in {path}"
    raise UsageError(f"--resume: {what}; give never, auto, a run or a step folder")


def _check_foreign(out: Path) -> None:
    """Raises UsageError where a run in `out` would write over files that are no run's."""
    if os.path.exists(out / checkpoint.TRAINER) or checkpoint.STEP.fullmatch(out.name):
        raise UsageError(
            f"--out {out}: is a checkpoint, which a run would damage; give the run's own folder, or a new one"
        )
    file = out / checkpoint.CONFIG
    if not file.is_file() or (out / METRICS).exists() or steps(out):
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= RUN:
        raise UsageError(
            f"--out {out}: has a {file.name} that is no run's, and a run would write over it; choose another"
        )


def leave_branch(out: Path, saved: Reader | None, step: int, config: RunConfig, say: Callable[[str], None]) -> None:
    """Before a run begins in `out` at `step`, from `saved` if any: set aside what another run, or this one at later
    steps, left there, and say so. Raises WriteError."""
    line = None
    if saved:
        line = set_aside(out, step if saved.path.parent.resolve() == out.resolve() else None)
    elif config.resume == "never":  # one that ended before its first checkpoint
        line = set_aside(out, None)
    if line:
        say(line)


def newest(out: Path, say: Callable[[str], None] = print) -> Reader | None:
    """The newest whole checkpoint in a run's folder; damaged ones are said and passed over."""
    found = checkpoint.latest(out)
    for path, why in found.damaged:
        say(f"skipping {path.name}: {why}")
    return found.reader()
