"""Checkpoints beside the training: copied to host memory, then written by one thread, one at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from optimizers.contract import Params, State
from optimizers.state import parked_by, with_status

from . import store
from .tensorfile import WriteError, storable


def snapshot(tensors: Mapping[str, Tensor]) -> Params:
    """Copies in host memory, tied ones still one. Raises CheckpointError where a checkpoint could not hold one."""
    names = storable(tensors)
    copies = {name: tensors[name].detach().to("cpu", copy=True) for name in dict.fromkeys(names.values())}
    return {name: copies[first] for name, first in names.items()}


class NotDeleted(WriteError):
    """A checkpoint is written; one that it was to replace stays."""


class Saver:
    """Writes a run's checkpoints and deletes those that are no longer to be kept.

    In the background, training goes on as soon as weights and state are copied to host memory, which takes as many
    bytes there until they are written, and waits only where the checkpoint before is still being written.
    """

    def __init__(self, root: Path, keep_last: int, keep_every: int, background: bool) -> None:
        self.root, self.keep_last, self.keep_every, self.background = root, keep_last, keep_every, background
        self.spared: int | None = None  # the step of a checkpoint that is kept beside these
        self._pool = ThreadPoolExecutor(1, "checkpoint")  # its thread starts with the first job; Python joins it
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        params: Params,
        state: State,
        trainer: Mapping[str, Any],
        model_config: Mapping[str, Any],
        header: Mapping[str, str],
        merge: Callable[[Params, State], Params] | None = None,
    ) -> None:
        """Begin to write a checkpoint, as `store.save` does; `wait` says what came of it, and comes in between.

        Nothing that is passed is read after the return.
        """
        assert self._writing is None, "wait() first: there is room for one copy, not for two"
        if self.background:
            params = snapshot(params)
            flat = snapshot({f"{owner}/{slot}": t for owner, slots in state.items() for slot, t in slots.items()})
            state = {
                owner: with_status(parked_by(slots), {slot: flat[f"{owner}/{slot}"] for slot in slots})
                for owner, slots in state.items()
            }
        job = partial(store.save, self.root, step, params, state, trainer, model_config, header, merge)
        self._writing = self._pool.submit(self._write, job, step, self.spared)
        if not self.background:
            self._writing.exception()  # done, well or not: `wait` returns at once

    def wait(self) -> WriteError | None:
        """Until nothing is being written. Returns the error of a disk that did not take it; raises any other."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except WriteError as error:
            return error
        except BaseException:
            if writing is not None and not writing.done():  # a signal, not an answer
                self._writing = writing
            raise
        return None

    def _write(self, job: Callable[[], Path], step: int, spared: int | None) -> None:
        path = job()
        try:
            store.prune(self.root, self.keep_last, self.keep_every, step, spared)
        except OSError as error:
            raise NotDeleted(f"{path} is saved, but older checkpoints cannot be deleted: {error}") from error
