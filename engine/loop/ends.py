"""The exceptions with which a run ends before its last step."""

import signal
from pathlib import Path


class NonFiniteError(Exception):
    """The loss or a gradient stopped being finite. The last checkpoint was written before that."""


class Interrupted(Exception):
    """A signal asked the run to end, and everything was saved."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved {path}; continue with --resume auto")
        self.code = 128 + signum
