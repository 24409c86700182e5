"""A run that goes on from an earlier step leaves a branch behind: it is set aside, in `<run>/aside-<n>/`, not deleted.

The folder holds the newer checkpoints, the records of metrics.jsonl after the step, the TensorBoard events, the picture
and the numbers at the end of the run, and copies of its config.json and tokenizer, so that it can be read as a run.
"""

import json
import shutil
from itertools import count
from pathlib import Path

from ..atomic import write_whole
from .form import STEP, steps
from .tensorfile import WriteError

METRICS = "metrics.jsonl"
ENDS = ("result.json", "loss.png")
COPIED = ("config.json", "swap.json", "tokenizer")


def set_aside(root: Path, step: int | None) -> str | None:
    """Move what the run in `root` did after `step` (None: all of it) out of the way of one that goes on from there.

    Returns what to say of it; None where there are no newer checkpoints, and so no other branch. The caller owns the
    folder. Raises WriteError.
    """
    after = -1 if step is None else step
    newer = {path: int(match[1]) for path in steps(root) if (match := STEP.fullmatch(path.name))}
    newer = {path: number for path, number in newer.items() if number > after}
    try:
        kept, cut = _split(root / METRICS, after)
        if not newer and (step is not None or not cut):
            return None
        for n in count(1):
            aside = root / f"aside-{n}"
            try:
                aside.mkdir()
                break
            except FileExistsError:
                continue
        for path in sorted(newer, reverse=True):  # the newest first: a kill in between leaves a line of steps
            path.rename(aside / path.name)
        if cut:
            write_whole(aside / METRICS, "".join(cut))
            write_whole(root / METRICS, "".join(kept))
        for path in (*root.glob("events.out.tfevents*"), *(root / name for name in ENDS)):
            if path.exists():
                path.rename(aside / path.name)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, aside / name, copy_function=shutil.copyfile)
            elif (root / name).exists():
                shutil.copyfile(root / name, aside / name)
    except OSError as error:
        why = f"cannot be set aside: {error.strerror or error}; make room, or give another --out"
        raise WriteError(f"{error.filename or root}: {why}") from error
    where = "another run" if step is None else f"going on from step {step}"
    numbers = sorted(set(newer.values()))
    what = f"step{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else "no checkpoint"
    return f"{where}: {what} and {len(cut)} record{'s' * (len(cut) != 1)} of {METRICS} are set aside in {aside}"


def _split(file: Path, after: int) -> tuple[list[str], list[str]]:
    """Lines of records up to a step, and those after it. A line that is no record goes with the latter."""
    kept: list[str] = []
    cut: list[str] = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for line in lines:
        try:
            early = json.loads(line)["step"] <= after
        except (ValueError, KeyError, TypeError):
            early = False
        (kept if early else cut).append(line + "\n")
    return kept, cut
