"""Settings of every run. The fields are flags of every recipe, and the strings under them are their help."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from optimizers.contract import UsageError

from .loop.schedule import Kind
from .step.step import Clip, Mode

Precision = Literal["fp32", "bf16", "bf16-sr", "bf16+8", "mixed"]
Matmul = Literal["highest", "high", "medium"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, precision and bookkeeping of a run. Model and data are the task's; the optimizer is the caller's."""

    micro_batch: int = 8
    """Rows (sequences, examples) that go through the model at once."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    steps: int = 300
    """Optimizer steps."""
    warmup: int | None = None
    """Steps of linear warm-up; by default a tenth of the steps, or of the --decay-steps of a cosine or line."""
    rewarm: int = 20
    """Steps of linear warm-up after the optimizer was swapped: the new one's first steps are its least informed."""
    schedule: Kind = "cosine"
    """Shape of the learning rate after the warm-up. wsd (warm-up, stable, decay) stays at the peak and falls along a
    line at the end; multistep is multiplied by --gamma at each of the --milestones."""
    floor: float = 0.1
    """Fraction of the peak learning rate at which the decay ends."""
    decay_steps: int | None = None
    """Cosine and linear: the step at which the decay ends, by default the last. Give the number of steps that a run
    had, and lengthening it with --steps does not raise its rate. wsd: how many of the last steps decay, by default a
    tenth; a checkpoint from before the decay can be trained on for as long as you like."""
    milestones: tuple[float, ...] = ()
    """multistep: shares of the steps, such as 0.5 0.75, at each of which the learning rate falls."""
    gamma: float = 0.1
    """multistep: what the learning rate is multiplied by there."""
    clip: Clip = "none"
    """Gradient clipping: each tensor's norm; the global norm, for which all gradients must exist at once; or by what
    the previous step's global norm asks for, which costs no memory."""
    clip_norm: float = 1.0
    """The norm to clip to."""
    precision: Precision = "fp32"
    """Weights and arithmetic in fp32 or bf16; bf16-sr rounds weight updates stochastically; bf16+8 keeps 8
    more bits of each weight in the optimizer's state; mixed keeps fp32 weights and computes in bf16."""
    compile: Mode = "segments"
    """Compile segment by segment, or not at all."""
    matmul: Matmul = "highest"
    """Products of fp32 matrices: highest in fp32; high in TF32 on CUDA, of which 10 bits of a factor count; medium in
    bf16, of which 8 do. Sums are fp32 in all of them."""
    deterministic: bool = False
    """On CUDA: the same bits in every run on a GPU of the same kind, with the same torch; slower. On the CPU that holds
    without it."""
    freeze: tuple[str, ...] = ()
    """Regular expressions, searched in parameters' names: what matches is not trained, and has no optimizer state."""
    recompute: bool = False
    """Rebuild activations in backward instead of keeping them."""
    seed: int = 0
    """Of weights, data order and every random draw."""
    out: Path | None = None
    """Folder of the run; by default a new one under runs/."""
    resume: str = "never"
    """"auto" continues from the newest whole checkpoint in `out` or starts anew; a path continues from that one."""
    reorder: bool = False
    """With --resume: go on although data, seed, sequence or batch are others, so that the place in the data means
    nothing: a new pass over the data begins, in the new order."""
    eval_every: int = 100
    """Steps between evaluations on held-out text; one more follows the last step."""
    eval_first: bool = False
    """Evaluate before the first step too."""
    patience: int = 0
    """End the run after so many evaluations in a row that are no better than the best before them; 0: never."""
    keep_best: bool = False
    """Save a checkpoint wherever the held-out loss is the lowest so far, and keep the one where it is."""
    save_every: int = 1000
    """Steps between checkpoints; one more follows the last step."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this, for ever; 0: none."""
    save_async: Literal["auto", "on", "off"] = "auto"
    """Train on while a checkpoint is written, from a copy in host memory of weights and optimizer state. "auto" does on
    CUDA; on the CPU that copy lies in the memory that the run trains in."""
    inspect_every: int = 0
    """Steps between looks at the optimizer's state (stable rank, bases, size of updates: optim/<rule>/); 0: never."""
    check_memory: bool = True
    """Count what the tensors of the last step take, and compare it with what tools.plan predicts."""
    profile: int = 0
    """Steps, after the first two, of which a trace is written into the run's folder, for TensorBoard or Perfetto: what
    each segment and update takes; 0: none."""
    log_every: int = 10
    """Steps between log lines."""
    device: str = "auto"
    """"auto" takes CUDA where it is, else the CPU."""

    def check(self) -> None:
        """Raises UsageError where a field makes no sense. Not in __post_init__: tyro would print its own box then."""
        for name in ("micro_batch", "accumulation", "steps", "eval_every", "save_every"):
            self.at_least(name, 1)
        for name in ("keep_last", "log_every"):
            self.at_least(name, 1)
        for name in ("keep_every", "inspect_every", "rewarm", "patience", "profile"):
            self.at_least(name, 0)
        if not self.clip_norm > 0:
            raise UsageError(f"--clip-norm must be above 0, got {self.clip_norm}")

    def at_least(self, name: str, least: float) -> None:
        """Raises UsageError where a field is below `least`."""
        if not getattr(self, name) >= least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")

    @property
    def warmup_steps(self) -> int:
        if self.warmup is not None:
            return self.warmup
        return (self.decay_steps if self.decay_steps and self.schedule in ("cosine", "linear") else self.steps) // 10

    def plain(self) -> dict[str, Any]:
        """Every field as JSON can hold it."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


class StepOptions(TypedDict):
    """What `Step` is told of a run's config."""

    mode: Mode
    recompute: bool
    clip: Clip
    clip_norm: float
    compute_dtype: torch.dtype | None
    stochastic_rounding: bool
    logits: int


def step_options(config: RunConfig, device: str) -> StepOptions:
    """Options of the `Step` of a run on a device of this type, such as "cuda"."""
    return StepOptions(
        mode=config.compile,
        recompute=config.recompute,
        clip=config.clip,
        clip_norm=config.clip_norm,
        compute_dtype=torch.bfloat16 if config.precision == "mixed" else None,
        stochastic_rounding=config.precision == "bf16-sr",
        logits=2**26 if device == "cuda" else 2**24,
    )


def weights_dtype(config: RunConfig) -> torch.dtype:
    """The dtype that the weights of a run are stored in."""
    return torch.bfloat16 if config.precision.startswith("bf16") else torch.float32


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
