"""A trace of some steps for TensorBoard or Perfetto, in which segments and updates have their names."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..step.observer import NOTHING, Observer

FILE = "profile.pt.trace.json"  # what TensorBoard looks for
FIRST = 2  # the step, counted from 0 in this process, with which it begins: those before it compile


class Profile(Observer):
    """Profiles `steps` steps of a process, or none, and writes what it saw into the run's folder."""

    def __init__(self, steps: int, out: Path, device: torch.device) -> None:
        self.steps, self.file = steps, out / FILE
        self._seen = 0
        self._running: Any = None
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._activities = [ProfilerActivity.CPU, *cuda]

    def doing(self, moment: str, part: str) -> AbstractContextManager[None]:
        return record_function(moment) if self._running else NOTHING

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step of the run."""
        if self.steps and self._seen == FIRST:
            self._running = profile(activities=self._activities)
            self._running.start()
        with self.doing(f"step {number}", "step"):
            yield
        self._seen += 1
        if self._running and self._seen == FIRST + self.steps:
            self._write()

    def finish(self) -> str:
        """Write what was seen if the run has ended early; says where the trace is, or why there is none."""
        if self._running:
            self._write()
        if not self.steps:
            return ""
        if self._seen > FIRST:
            return (
                f"{self.file}, {min(self._seen - FIRST, self.steps)} steps: open it in TensorBoard or ui.perfetto.dev"
            )
        return f"none: the first {FIRST} steps of a process compile, and {self._seen} were made; give more --steps"

    def _write(self) -> None:
        self._running.stop()
        self._running.export_chrome_trace(str(self.file))
        self._running = None
