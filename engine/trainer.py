"""The loop: data, schedule, steps, evaluation, checkpoints. What a run has done is (step, position in the data)."""

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from optimizers.core import Hyper

from . import checkpoint
from .checkpoint import Checkpoint, CheckpointError
from .config import RunConfig
from .data import Batches
from .memory import peak_bytes
from .metrics import Metrics
from .schedule import Schedule
from .segments import Batch
from .step import Result, Step


class NonFiniteError(Exception):
    """The loss or a gradient stopped being finite. The last checkpoint was written before that."""


class Interrupted(Exception):
    """A signal asked the run to end, and everything was saved."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved {path}; continue with --resume auto")
        self.code = 128 + signum


class Trainer:
    """One run. `train()` returns the last held-out loss."""

    def __init__(
        self,
        config: RunConfig,
        step: Step,
        train: Batches,
        validation: Batches,
        out: Path,
        model_config: Mapping[str, Any],
    ) -> None:
        self.config, self.step, self.data, self.validation = config, step, train, validation
        self.out, self.model_config = out, model_config
        self.schedule = Schedule(config.steps, config.warmup_steps, config.schedule, config.floor)
        self.groups = {group.name: group for group in step.optimizer.owner.values()}
        self.hypers: dict[str, Hyper] = {
            name: {key: torch.zeros((), device=step.device) for key in ("lr", "weight_decay")} for name in self.groups
        }
        self.done = 0  # optimizer steps
        self.position = 0  # windows of the training data
        self.pending: list[tuple[int, Result]] = []  # steps whose numbers nobody has read yet
        self.skipped = 0  # bases kept because the gradient at their refresh was unusable
        self.signal: int | None = None

    def resume(self, saved: Checkpoint) -> list[str]:
        """Continue from `saved`; returns settings that differ. Raises CheckpointError if it cannot fit."""
        was = saved.trainer["config"]
        if saved.trainer["data"] != self.data.tokens.fingerprint or was["sequence"] != self.config.sequence:
            raise CheckpointError(
                f"{saved.path}: was trained on other data or with --sequence {was['sequence']}; its position in the "
                "data means nothing here. Give it the same --data, --tokenizer and --sequence"
            )
        expected = self.step.optimizer.init(self.step.params, saved.step)
        for name in {**expected, **saved.state}:
            mine, other = (
                {slot: (tuple(t.shape), t.dtype) for slot, t in state.get(name, {}).items()}
                for state in (expected, saved.state)
            )
            if mine != other or (name in expected) != (name in saved.state):
                raise CheckpointError(
                    f"{saved.path}: optimizer state of {name} is {other or 'not there'}, expected {mine or 'none'}; "
                    "resume with the optimizer, its settings, seed and precision that it was trained with"
                )
        try:
            checkpoint.restore_into(self.step.params, saved.params)
        except CheckpointError as error:
            raise CheckpointError(f"{saved.path}: {error}") from None
        copies: dict[int, Tensor] = {}  # slots that two tensors share stay one
        self.step.state.clear()
        for name, slots in saved.state.items():
            for t in slots.values():
                copies.setdefault(id(t), t.to(self.step.device, copy=True))
            self.step.state[name] = {slot: copies[id(t)] for slot, t in slots.items()}
        self.done, self.position = saved.step, saved.trainer["position"]
        self.step.previous = torch.tensor(saved.trainer["previous_norm"], device=self.step.device)
        now = self.config.plain()
        return [
            f"{k} {was[k]} -> {now[k]}" for k in now if k in was and was[k] != now[k] and k not in ("resume", "out")
        ]

    def train(self, metrics: Metrics) -> float:
        """Run to the last step. Raises NonFiniteError, Interrupted."""
        config, tokens, since = self.config, 0, time.monotonic()
        loss = math.nan
        with self._signals(metrics):
            while self.done < config.steps:
                self.pending.append((self.done, self._one_step()))
                self.done += 1
                self.position += config.micro_batch * config.accumulation
                tokens += config.micro_batch * config.accumulation * config.sequence
                last = self.done == config.steps or self.signal is not None
                metrics.show(self.done)
                if not (last or self.done == 1 or self._due(config.log_every, config.eval_every, config.save_every)):
                    continue
                if scalars := self._settle():
                    scalars["train/tokens_per_second"] = tokens / (time.monotonic() - since)
                    scalars |= self._memory()
                    metrics.log(self.done, scalars)
                    metrics.show(self.done, self._line(scalars, loss))
                if self.signal is None and (last or self._due(config.eval_every)):
                    loss = self.evaluate()
                    metrics.log(self.done, {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))})
                if last or self._due(config.save_every):
                    path = self.save()
                    if self.signal is not None:
                        raise Interrupted(self.signal, path)
                tokens, since = 0, time.monotonic()  # evaluation and saving are not training time
        return loss if self.done and not math.isnan(loss) else self.evaluate()

    def evaluate(self) -> float:
        """Mean loss over held-out windows, every target once."""
        total = torch.zeros((), dtype=torch.float64)
        count = torch.zeros((), dtype=torch.float64)
        params = self.step.view()
        for batch in self.validation.evaluation(self.config.micro_batch, self.config.eval_windows):
            loss, valid = self.step.chain.loss(params, self._to_device(batch))
            total += loss.double().cpu()
            count += valid.double().cpu()
        return float(total / count)

    def save(self) -> Path:
        """Write a checkpoint. Every step before it is known to be finite: the loop settles first.

        Raises NonFiniteError where the last update made a parameter overflow: the checkpoints before it stay the last.
        """
        finite = torch.stack([p.detach().isfinite().all() for p in self.step.params.values()]).tolist()
        if not all(finite):
            name = list(self.step.params)[finite.index(False)]
            raise self._failure(f"step {self.done}: its update left {name} with values that are not finite")
        trainer = {
            "position": self.position,
            "tokens": self.position * self.config.sequence,
            "data": self.data.tokens.fingerprint,
            "previous_norm": self.step.previous.item(),
            "config": self.config.plain(),
        }
        rules = {
            "optimizer": ",".join(g.rule.name for g in self.groups.values()),
            **self.step.optimizer.about,
        }
        path = checkpoint.save(
            self.out, self.done, self.step.params, self.step.state, trainer, self.model_config, rules
        )
        checkpoint.prune(self.out, self.config.keep_last)
        return path

    def _due(self, *every: int) -> bool:
        return any(self.done % n == 0 for n in every)

    def _one_step(self) -> Result:
        config, factor = self.config, self.schedule.factor(self.done)
        for name, group in self.groups.items():
            self.hypers[name]["lr"].fill_(group.lr * factor)
            self.hypers[name]["weight_decay"].fill_(group.weight_decay)
        self.step.turn(self.done)
        size = config.micro_batch * config.accumulation
        first = self.position + (self.step.optimizer.batch(self.done) - self.done) * size
        batches = [
            self._to_device(self.data.batch(first + j * config.micro_batch, config.micro_batch))
            for j in range(config.accumulation)
        ]
        return self.step(batches, self.hypers, self.done)

    def _settle(self) -> dict[str, float]:
        """Read the numbers of the steps since the last call, in one transfer; returns their means and the last norm."""
        if not self.pending:
            return {}
        losses = torch.stack([r.loss for _, r in self.pending]).tolist()
        norms = torch.stack([r.norm for _, r in self.pending]).tolist()
        for (step, result), loss, norm in zip(self.pending, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                name = result.first_nonfinite()
                where = (
                    f"the first gradient that is not finite, in backward order, is that of {name}"
                    if name
                    else (
                        "every gradient is finite, but their norm overflows"
                        if math.isfinite(loss)
                        else "every gradient is finite"
                    )
                )
                raise self._failure(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}; {where}")
        refreshed = [ok for _, r in self.pending for ok in r.refreshed]
        if refreshed:
            self.skipped += len(refreshed) - int(torch.stack(refreshed).sum())
        self.pending = []
        scalars = {"train/loss": sum(losses) / len(losses), "train/grad_norm": norms[-1]}
        scalars |= {f"train/learning_rate/{n}": h["lr"].item() for n, h in self.hypers.items()}
        if any(g.rule.gap for g in self.groups.values()):
            scalars["optim/refreshes"] = float(len(refreshed))
            scalars["optim/refreshes_skipped"] = float(self.skipped)
        return scalars

    def _failure(self, what: str) -> NonFiniteError:
        saved = checkpoint.latest(self.out).path
        return NonFiniteError(
            f"{what}. The last good checkpoint is {saved or 'none: none was due yet'}; try a lower --lr, a longer "
            "--warmup or --clip previous"
        )

    def _memory(self) -> dict[str, float]:
        kind = "peak_allocated_gib" if self.step.device.type == "cuda" else "peak_resident_gib"
        return {f"memory/{kind}": peak_bytes(self.step.device) / 2**30}

    def _line(self, scalars: Mapping[str, float], held_out: float) -> str:
        memory = next(v for k, v in scalars.items() if k.startswith("memory/"))
        parts = [
            f"loss {scalars['train/loss']:.3f}",
            "" if math.isnan(held_out) else f"held-out {held_out:.3f}",
            f"{scalars['train/tokens_per_second']:,.0f} tokens/s",
            f"{memory:.2f} GiB",
        ]
        return "  ".join(filter(None, parts))

    def _to_device(self, batch: dict[str, Tensor]) -> Batch:
        return {name: t.to(self.step.device, non_blocking=True) for name, t in batch.items()}

    @contextmanager
    def _signals(self, metrics: Metrics) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signum
            name = signal.Signals(signum).name
            metrics.say(f"{name}: saving after this step; another signal ends the run without saving")

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
