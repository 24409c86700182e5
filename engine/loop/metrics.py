"""Where numbers go: `metrics.jsonl`, TensorBoard events and a progress bar (plain lines when nobody watches)."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..atomic import naming, write_whole
from ..terminal.attempt import attempt

FILE = "metrics.jsonl"


class Metrics:
    """Sinks of one run. Records of steps that a resumed run does again are dropped when it starts."""

    def __init__(self, out: Path, start: int, steps: int, console: Console) -> None:
        self.out, self.steps, self.console = out, steps, console
        self.history = [record for record in read(out) if record["step"] <= start] if start else []
        write_whole(out / FILE, "".join(json.dumps(r) + "\n" for r in self.history))
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        told = any(out.glob("events.out.tfevents*"))
        self.writer = SummaryWriter(out, purge_step=start + 1 if start else None)
        for record in () if told else self.history:  # another branch took its events along
            for name, value in record.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(record["step"]))
        whole = Column(no_wrap=True)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[text]}", table_column=Column()),
            TextColumn("eta"),
            TimeRemainingColumn(table_column=whole),
        ]
        if console.width >= 100:  # on a narrow terminal the numbers matter more than the bar
            columns.insert(1, BarColumn(bar_width=20))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=120)
        self.task = self.progress.add_task("compiling", total=steps, completed=start, text="")
        self.spoke = time.monotonic()

    def __enter__(self) -> "Metrics":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if line := attempt(self._close, "recorded"):
            self.say(f"warning: the last TensorBoard events are {line}")

    def _close(self) -> str:
        self.writer.close()
        return ""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of `step` (steps done so far)."""
        record = {"step": step, **scalars}
        self.history.append(record)
        with naming(self.out / FILE), (self.out / FILE).open("ab") as file:
            whole = not file.tell() or self._ends_whole()
            file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def _ends_whole(self) -> bool:
        """False where a full disk took only the beginning of a line."""
        with (self.out / FILE).open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) == b"\n"

    def show(self, step: int, text: str = "") -> None:
        """Move the bar; where there is none, print a line every ten seconds."""
        self.progress.update(self.task, completed=step, description="step")
        if text:
            self.progress.update(self.task, text=text)
        if text and not self.console.is_terminal and (time.monotonic() - self.spoke > 10 or step == self.steps):
            self.console.print(f"step {step}/{self.steps}  {text}", highlight=False)
            self.spoke = time.monotonic()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)


def series(out: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric. Of a step that was done again, what was written last counts; null is nan."""
    steps: list[int] = []
    values: list[float] = []
    for record in read(out):
        if name not in record:
            continue
        while steps and steps[-1] >= record["step"]:
            steps.pop(), values.pop()
        value = record[name]
        steps.append(int(record["step"]))
        values.append(float(value) if isinstance(value, int | float) else math.nan)
    return steps, values


def read(out: Path) -> list[dict[str, float]]:
    """The records of a run, oldest first; a line cut short, by a kill or a full disk, is left out."""
    records = []
    file = out / FILE
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
