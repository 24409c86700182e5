"""The loop: data, schedule, steps, evaluation, checkpoints. What a run has done is (step, position in the data)."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from optimizers.contract import Hyper, Optimizer
from optimizers.convert import Row

from .. import checkpoint
from ..checkpoint import Reader, WriteError
from ..checkpoint.rules import rules_head
from ..checkpoint.saver import NotDeleted, Saver
from ..config import RunConfig
from ..inspection import summary
from ..step.step import Result, Step
from ..task import Task
from ..terminal import signals
from . import best, shown
from .counting import counted
from .ends import Interrupted as Interrupted
from .ends import NonFiniteError as NonFiniteError
from .evaluation import evaluate
from .feed import Feed
from .metrics import Metrics
from .numbers import NotFinite, Numbers
from .position import saved_order
from .profile import Profile
from .restore import restore
from .schedule import Schedule, rate_changes


class Trainer:
    """One run of a task. `train()` returns the metrics of the last evaluation."""

    def __init__(self, config: RunConfig, step: Step, task: Task, out: Path) -> None:
        self.config, self.step, self.task, self.out = config, step, task, out
        shape = config.schedule, config.floor, config.decay_steps, config.milestones, config.gamma
        self.schedule = Schedule(config.steps, config.warmup_steps, *shape)
        self.groups = {group.name: group for group in step.optimizer.owner.values()}
        self.hypers: dict[str, Hyper] = {
            name: {key: torch.zeros((), device=step.device) for key in ("lr", "weight_decay")} for name in self.groups
        }
        self.done = 0  # optimizer steps
        self.position = 0  # rows of the training data
        self.offset = 0  # units that the position counts more than were trained on: a pass was not finished
        self.notes: list[str] = []  # what a user should know of how a resumed run goes on
        self.numbers = Numbers()  # of the steps that no line has told of yet
        self.measured: int | None = None  # most bytes of tensors at once in the last step
        self.converted: list[Row] = []  # what became of another optimizer's state
        self.saved: Path | None = None  # the last checkpoint, or the one that the run goes on from
        self.swapped: int | None = None  # the step at which that was
        background = config.save_async == "on" or (config.save_async == "auto" and step.device.type == "cuda")
        self.saver = Saver(out, config.keep_last, config.keep_every, background)
        self.feed = Feed(lambda position, rows: self.task.batch(position, rows), step.device)
        self.profile = Profile(config.profile, out, step.device)
        if config.profile:
            step.watch(self.profile)
        self.say: Callable[[str], None] = print
        self.after_evaluation: Callable[[Metrics, int], None] = lambda metrics, step: None

    @torch.no_grad()
    def resume(self, saved: Reader, source: Optimizer | None = None) -> list[str]:
        """Continue from `saved`; returns settings that differ. `self.notes` says what they change.

        Raises CheckpointError, having changed nothing, if it cannot fit. Given `source`, the optimizer that it was
        trained with, its state is converted to this run's, and `self.converted` says what became of it.
        """
        was = restore(self.step, saved, self.config, self.task, source)
        self.done, self.swapped, self.converted = was.step, was.swapped, was.converted
        self.saved = saved.path
        self.position, self.offset = was.position, was.offset
        if self.swapped is not None:
            self.schedule = replace(self.schedule, swapped=self.swapped, rewarm=self.config.rewarm)
        self.notes = [was.reads_on] if was.reads_on else []
        if source is None:
            self.notes += rate_changes(self.done, was.rates, self.rates(self.done))
        return was.changed

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate of each group at a step."""
        return {name: group.lr * self.schedule.factor(step) for name, group in self.groups.items()}

    @property
    def trained(self) -> int:
        """How many of the task's units the run has trained on."""
        return self.task.units(self.position) - self.offset

    def train(self, metrics: Metrics, until: int | None = None) -> dict[str, float]:
        """Run to the last step, or until so many are done. Raises NonFiniteError, Interrupted."""
        end = min(self.config.steps, until or self.config.steps)
        config, rows, since = self.config, 0, time.monotonic()
        held_out: dict[str, float] = {}
        evaluated, self.say = self.done, metrics.say
        with signals.noted(self.say) as asked, self._all_written():
            began = self.done
            if config.eval_first and self.done == 0:
                held_out = self._evaluated(metrics)
            self.saver.spared = best.kept(metrics.history) if config.keep_best else None
            end = self.done if self._out_of_patience(metrics) else end
            while self.done < end:
                counting = config.check_memory and began < self.done == end - 1  # not in the step that compiles
                before = time.monotonic()
                with self.profile.step(self.done):
                    self.numbers.add(self.done, self._counted_step() if counting else self._one_step())
                self.done += 1
                self.position += config.micro_batch * config.accumulation
                rows += config.micro_batch * config.accumulation
                if self.done == began + 1:  # what it took to compile is not how fast the run is
                    self._wait_for_device()
                    rows, since = 0, time.monotonic()
                elif counting and self.step.device.type == "cpu":  # nor what it takes to count its tensors
                    rows -= config.micro_batch * config.accumulation
                    since += time.monotonic() - before
                last = self.done == end or bool(asked)
                metrics.show(self.done)
                looking = config.inspect_every > 0 and self._due(config.inspect_every)
                due = self._due(config.log_every, config.eval_every, config.save_every)
                if not (last or looking or self.done == 1 or due):
                    continue
                scalars = self._settle()
                scalars |= shown.speed(self.task, rows, time.monotonic() - since)
                scalars |= shown.memory(self.step.device) | (self._look() if looking else {})
                self._log(metrics, scalars)
                if not asked and (last or self._due(config.eval_every)):
                    held_out, evaluated = self._evaluated(metrics), self.done
                    if not last and self._out_of_patience(metrics):
                        last, end = True, self.done
                better = config.keep_best and evaluated == self.done and best.kept(metrics.history) == self.done
                metrics.show(self.done, shown.line(self.task, scalars, held_out, evaluated, self.done))
                if last or better or self._due(config.save_every):
                    self.saver.spared = best.kept(metrics.history) if config.keep_best else None
                    self._warn(self.saver.wait())
                    path = self.save()
                    if last or not self.saver.background:
                        error = self.saver.wait()
                        if last and error and not isinstance(error, NotDeleted):
                            raise WriteError(f"step {self.done}, the last, is not saved: {error}. {self._whole()}")
                        self._warn(error)
                    if asked.signum is not None:
                        raise Interrupted(asked.signum, path)
                rows, since = 0, time.monotonic()  # evaluation and saving are not training time
        if told := self.profile.finish():
            self.say(f"profile      {told}")
        if self.saved and self.saved.parent.resolve() != self.out.resolve():  # nothing was left to train
            self.save_now()
        return held_out if held_out and evaluated == self.done else self.evaluate()

    def evaluate(self) -> dict[str, float]:
        """The task's metrics on its held-out rows."""
        return evaluate(self.task, self.step, self.config.micro_batch)

    def _evaluated(self, metrics: Metrics) -> dict[str, float]:
        """The same, recorded; and what else is to be done where a run is evaluated."""
        found = self.evaluate()
        self._log(metrics, {f"eval/{name}": value for name, value in found.items()})
        self.after_evaluation(metrics, self.done)
        return found

    def _out_of_patience(self, metrics: Metrics) -> bool:
        """Was none of the last evaluations any better? Says so."""
        found = best.best(metrics.history)
        if not self.config.patience or found is None or found.since < self.config.patience:
            return False
        metrics.say(
            f"stopped early: held-out loss {found.loss:.4f} at step {found.step} was not bettered in {found.since} "
            "evaluations (--patience)"
        )
        return True

    def save_now(self) -> Path:
        """Write a checkpoint and wait for it. Raises NonFiniteError, WriteError."""
        path = self.save()
        if error := self.saver.wait():
            raise error
        return path

    def save(self) -> Path:
        """Begin to write a checkpoint. Every step before it is known to be finite: the loop settles first.

        Raises NonFiniteError where the last update made a parameter overflow: the checkpoints before it stay the last.
        """
        finite = torch.stack([p.detach().isfinite().all() for p in self.step.params.values()]).tolist()
        if not all(finite):
            name = list(self.step.params)[finite.index(False)]
            raise self._failure(f"step {self.done}: its update left {name} with values that are not finite")
        trainer = {
            "position": self.position,
            self.task.unit: self.trained,
            "offset": self.offset,
            "data": saved_order(self.task),
            "rates": self.rates(self.done),
            "previous_norm": self.step.previous.item(),
            "swapped": self.swapped,
            "config": self.config.plain(),
        }
        model, merge = self.task.model_config(), self.step.optimizer.merge
        weights = {**self.step.params, **self.step.buffers}
        self.saver.save(self.done, weights, self.step.state, trainer, model, self._header(), merge)
        self.saved = self.out / f"step-{self.done:08d}"
        return self.saved

    def _header(self) -> dict[str, str]:
        """What is said of the optimizer's state beside it: see `rules_head`, and what the optimizer adds."""
        factor = self.schedule.factor(max(self.done - 1, 0))
        return {**rules_head(self.step.optimizer.owner, factor), **self.step.optimizer.metadata}

    def _due(self, *every: int) -> bool:
        return any(self.done % n == 0 for n in every)

    def _one_step(self) -> Result:
        config = self.config
        for name, rate in self.rates(self.done).items():
            self.hypers[name]["lr"].fill_(rate)
            self.hypers[name]["weight_decay"].fill_(self.groups[name].weight_decay)
        self.step.switch(self.done)
        batches = self.feed.batches(self._positions(0), config.micro_batch)
        result = self.step(batches, self.hypers, self.done)
        if self.done + 1 < config.steps:
            self.feed.read(self._positions(1), config.micro_batch)
        return result

    def _positions(self, later: int) -> list[int]:
        """Where the micro-batches of this step, or of one so much later, begin in the data."""
        step, rows, count = self.done + later, self.config.micro_batch, self.config.accumulation
        first = self.position + (self.step.optimizer.batch(step) - self.done) * rows * count
        return [first + j * rows for j in range(count)]

    def _counted_step(self) -> Result:
        result, self.measured = counted(self.step, self._one_step)
        return result

    def _settle(self) -> dict[str, float]:
        try:
            return self.numbers.settle(self.groups, self.hypers)
        except NotFinite as error:
            raise self._failure(str(error)) from None

    def _failure(self, what: str) -> NonFiniteError:
        self._warn(self.saver.wait())
        return NonFiniteError(f"{what}. {self._whole()}; try a lower --lr, a longer --warmup or --clip previous")

    def _whole(self) -> str:
        saved = checkpoint.latest(self.out).path
        return f"The last good checkpoint is {saved}" if saved else "There is no good checkpoint yet"

    def _warn(self, error: WriteError | None) -> None:
        """Say what the disk refused. The run goes on: the next checkpoint may find room."""
        if error:
            self.say(f"warning: {error}. {self._whole()}; the run goes on")

    def _log(self, metrics: Metrics, scalars: Mapping[str, float]) -> None:
        """Record numbers of this step; where a full disk takes no more of them, the run goes on without."""
        try:
            metrics.log(self.done, scalars)
        except OSError as error:
            self.say(f"warning: the numbers of step {self.done} are not recorded: {error}; the run goes on")

    def _look(self) -> dict[str, float]:
        factor, rounded = self.schedule.factor(self.done - 1), not self.step.stochastic_rounding
        return summary.scalars(self.step.params, self.step.state, self.step.optimizer.owner, factor, rounded)

    def _wait_for_device(self) -> None:
        if self.step.device.type == "cuda":
            torch.cuda.synchronize(self.step.device)

    @contextmanager
    def _all_written(self) -> Iterator[None]:
        """However the run ends, a checkpoint that is being written is finished first."""
        try:
            yield
        finally:
            self._warn(self.saver.wait())
