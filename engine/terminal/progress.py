"""The progress bar of a long piece of work."""

from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Bar:
    """Progress as a bar on a terminal, as a line every few seconds elsewhere."""

    def __init__(self, console: Console, seconds: float = 5) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.console, self.seconds = console, seconds
        self._tasks: dict[str, TaskID] = {}
        self._next = monotonic() + seconds

    def __call__(self, what: str, done: int, total: int) -> None:
        if not total:
            self.console.print(what, highlight=False, soft_wrap=True)
        elif self.console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self.progress.add_task(what)
            self.progress.update(self._tasks[what], completed=done, total=total)
        elif monotonic() > self._next:
            self.console.print(f"{what}: {done / total:.0%}", highlight=False)
            self._next = monotonic() + self.seconds
