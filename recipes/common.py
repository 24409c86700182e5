"""From flags to a finished run: what all training recipes share.

Exit codes: 0 done, 1 failure, 2 bad arguments, 4 non-finite loss, 5 incompatible checkpoint, 130 interrupted and saved.
"""

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.compile import can_compile
from engine.config import RunConfig
from engine.data import Batches, Tokens, tokenizer_of
from engine.memory import peak_bytes
from engine.metrics import Metrics
from engine.receipt import receipt
from engine.segments import cut
from engine.shards import Request, cached
from engine.step import Step
from engine.trainer import Interrupted, NonFiniteError, Trainer
from models.llama import PRESETS, Llama, LlamaConfig
from models.sampling import generate
from optimizers.adamw import adamw
from optimizers.core import Group, Optimizer, Params, Rule, UsageError, partition, state_bytes
from optimizers.random import Key, fold
from tools.generate import TOKENIZER
from tools.plot import loss_curve
from tools.prepare import Bar

MATRICES = r"layers\.\d+\..*_proj\.weight$"  # attention and MLP; embedding, norms and head go to AdamW


@dataclass(frozen=True)
class Size:
    """Sizes that differ from the preset's."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    tie_word_embeddings: bool | None = None
    """Share one matrix between embedding and head."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Flags of every recipe that trains a LLaMA."""

    model: Literal["demo", "60m", "130m", "350m", "1b", "7b"] = "demo"
    """Size of the LLaMA: GaLore's configurations, and a demo of about 3 M parameters."""
    size: Size = field(default_factory=Size)
    """Sizes by hand, over the preset's."""
    lr: float = 1e-3
    """Peak learning rate."""
    rest_lr: float | None = None
    """Peak learning rate of the AdamW that trains embedding, norms and head; by default `lr`."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms are never decayed."""
    stagger: bool = True
    """Rebuild subspace bases a few tensors a step, not all on the same step."""
    prompt: str = "def "
    """What the sample at the end of the run goes on from."""
    dry_run: bool = False
    """Print who trains what, and stop."""

    def check(self) -> None:
        super().check()
        self.at_least("lr", 0)
        if not self.lr < 3e38:
            raise UsageError(f"--lr must be a float32, got {self.lr}")
        self.at_least("weight_decay", 0)

    def shape(self, vocab_size: int) -> LlamaConfig:
        """The model's configuration. Raises UsageError where sizes do not go together."""
        given = {k: v for k, v in dataclasses.asdict(self.size).items() if v is not None}
        if "num_attention_heads" in given:  # a preset's grouping means nothing for another number of heads
            given.setdefault("num_key_value_heads", None)
        preset = PRESETS[self.model]
        positions = max(preset.max_position_embeddings, self.sequence)
        try:
            return dataclasses.replace(preset, vocab_size=vocab_size, max_position_embeddings=positions, **given)
        except ValueError as error:
            raise UsageError(str(error)) from None


Config = TypeVar("Config")


def groups_for(config: TrainConfig, rule: Rule, why: str, matrices: Sequence[str] = (MATRICES,)) -> list[Group]:
    """`rule` on the matrices that match; AdamW on the rest, at a rate of its own where asked."""
    rest = config.lr if config.rest_lr is None else config.rest_lr
    if rule.name == "adamw" and config.rest_lr is None:
        return [
            Group("adamw-norms", rule, ("norm",), config.lr, 0.0, "norms: never decayed"),
            Group("adamw", rule, ("",), config.lr, config.weight_decay, why),
        ]
    return [
        Group(rule.name, rule, tuple(matrices), config.lr, config.weight_decay, why),
        Group("adamw-norms", adamw(), ("norm",), rest, 0.0, "norms: vectors, never decayed"),
        Group("adamw-rest", adamw(), ("",), rest, config.weight_decay, "embedding and head: rows, not a map"),
    ]


class Setup(NamedTuple):
    """What an optimizer that wraps another may depend on."""

    model: Llama
    params: Params
    epoch: int  # steps in one pass over the data, the last one filled up
    key: Key


def train(
    config: TrainConfig,
    recipe: str,
    groups: Callable[[Params], list[Group]],
    wrap: Callable[[Optimizer, Setup], Optimizer] = lambda optimizer, setup: optimizer,
    align: bool = False,
) -> None:
    """One run from start to picture and sample. Raises UsageError, CheckpointError, NonFiniteError, Interrupted.

    `groups` says who trains what, `wrap` makes an optimizer of that optimizer; with `align`, epochs are whole steps.
    """
    config.check()
    watched = sys.stdout.isatty()  # what is printed are paths, patterns and samples: nothing in them is markup
    console = Console(soft_wrap=not watched, width=None if watched else 160, markup=False, emoji=False, highlight=False)
    device = _device(config.device)
    out, saved = _place(config, recipe, console)
    if config.compile != "off" and (reason := can_compile(device)):
        console.print(f"{reason}: running uncompiled, which is slower")
        config = dataclasses.replace(config, compile="off")

    bar = Bar(console)
    with bar.progress:
        folder = cached(Path("runs/.data"), Request(config.data, config.validation, config.tokenizer), bar)
    tokens, held_out, tokenizer = Tokens(folder), Tokens(folder, "validation"), tokenizer_of(folder)
    size = config.micro_batch * config.accumulation
    batches = Batches(tokens, config.sequence, fold(config.seed, "data"), size if align else 1)
    validation = Batches(held_out, config.sequence)

    shape = config.shape(tokenizer.vocab_size)
    model = Llama(shape, seed=config.seed).to(device)
    if config.precision.startswith("bf16"):
        model.to(torch.bfloat16)
    params: dict[str, Tensor] = dict(model.named_parameters())
    key = fold(config.seed, "optimizer")
    setup = Setup(model, params, -(-batches.windows // size), key)
    optimizer = wrap(partition(params, groups(params), config.stagger), setup)
    state = optimizer.init(params)
    step = Step(
        cut(model),
        params,
        optimizer,
        state,
        mode=config.compile,
        recompute=config.recompute,
        clip=config.clip,
        clip_norm=config.clip_norm,
        compute_dtype=torch.bfloat16 if config.precision == "mixed" else None,
        stochastic_rounding=config.precision == "bf16-sr",
        logits=2**26 if device.type == "cuda" else 2**24,
        key=key,
    )
    console.print(receipt(optimizer, params, state))
    documents = f"{tokens.documents:,} document" + "s" * (tokens.documents != 1)
    console.print(
        f"{len(tokens):,} training tokens in {documents}, {len(held_out):,} held out "
        f"({tokenizer.name}, vocabulary {tokenizer.vocab_size}); a step takes "
        f"{size * config.sequence:,}, the run "
        f"{config.steps * size / batches.windows:.2f} epochs",
    )
    if config.dry_run:
        return
    config = dataclasses.replace(config, out=out)
    trainer = Trainer(config, step, batches, validation, out, shape.to_hf())
    changed = trainer.resume(checkpoint.load(saved)) if saved else []  # before anything of the run is overwritten
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error.strerror}; choose another folder") from None
    for file in tokenizer.files:  # a run can be read wherever it lies
        (out / TOKENIZER).mkdir(exist_ok=True)
        shutil.copy2(file, out / TOKENIZER)
    (out / "config.json").write_text(json.dumps({"recipe": recipe, **config.plain()}, indent=1) + "\n")
    console.print(f"config: {json.dumps(config.plain())}", style="dim")
    if saved:
        differs = f"; changed: {', '.join(changed)}" if changed else ""
        console.print(f"resuming {saved} at step {trainer.done}{differs}")
    with Metrics(out, trainer.done, config.steps, console) as metrics:
        loss = trainer.train(metrics)
    _finish(config, trainer, metrics, loss, console)
    prompt = tokenizer.encode(config.prompt) or [tokenizer.eos]
    limit = min(200, shape.max_position_embeddings - len(prompt))
    sample = generate(model.eval(), prompt, limit, temperature=0.8, top_k=50, seed=config.seed, eos=tokenizer.eos)
    console.rule("a sample")
    console.print(tokenizer.decode([*prompt, *sample]))
    console.rule()


def _device(name: str) -> torch.device:
    """The device of that name. Raises UsageError where it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name}: cannot be used here: {why}; give auto, cpu or cuda") from None
    return device


def _place(config: TrainConfig, recipe: str, console: Console) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to continue from. Raises UsageError, CheckpointError."""
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        if not (path / checkpoint.TRAINER).exists():
            found = checkpoint.latest(path)
            if found.path is None:
                raise UsageError(f"--resume: no whole checkpoint in {path}; give never, auto, a run or a step folder")
            path = found.path
        return config.out or path.parent, path
    if config.out is None:
        stem = Path("runs") / "-".join(filter(None, [recipe, getattr(config, "optimizer", ""), config.model]))
        tried = (stem if i == 1 else stem.with_name(f"{stem.name}-{i}") for i in range(1, 10_000))
        return next(p for p in tried if not p.exists()) if config.resume == "never" else stem, (
            _newest(stem, console) if config.resume == "auto" else None
        )
    newest = _newest(config.out, console) if config.resume == "auto" else None
    if config.resume == "never" and checkpoint.latest(config.out).path:
        raise UsageError(f"--out {config.out} holds a run already; continue it with --resume auto or choose another")
    return config.out, newest


def _newest(out: Path, console: Console) -> Path | None:
    found = checkpoint.latest(out)
    for path, why in found.damaged:
        console.print(f"skipping {path.name}: {why}")
    return found.path


def _finish(config: TrainConfig, trainer: Trainer, metrics: Metrics, loss: float, console: Console) -> None:
    """The loss curve, and where everything is."""
    out = trainer.out
    curve = [(int(r["step"]), r["train/loss"]) for r in metrics.history if "train/loss" in r]
    points = [(int(r["step"]), r["eval/loss"]) for r in metrics.history if "eval/loss" in r]
    points = points or [(trainer.done, loss)]  # a finished run, resumed in another folder, trained nothing
    label = getattr(config, "optimizer", "loss")
    trained, held_out = (([s for s, _ in rows], [y for _, y in rows]) for rows in (curve, points))
    loss_curve(out / "loss.png", {label: trained}, f"{out.name}: loss in nats per token", held_out={label: held_out})
    rates = [r["train/tokens_per_second"] for r in metrics.history if "train/loss" in r]
    tokens = config.micro_batch * config.accumulation * config.sequence
    result = {
        "steps": trainer.done,
        "tokens": trainer.position * config.sequence,
        "eval/loss": loss,
        "curve": points,
        "state_bytes": sum(map(state_bytes, trainer.step.state.values())),
        "peak_bytes": peak_bytes(trainer.step.device),
        "seconds_per_step": tokens / median(rates) if rates else None,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(
        f"held-out loss {loss:.4f} nats per token\n"
        f"checkpoint   {checkpoint.latest(out).path or config.resume}\n"
        f"loss curve   {out / 'loss.png'}\n"
        f"numbers      {out / 'metrics.jsonl'}, {out / 'result.json'}\n"
        f"look at it   {command('tensorboard')} --logdir {out}\n"
        f"more text    {command('python')} -m tools.generate {out} --prompt {shlex.quote(config.prompt)}"
    )


def command(name: str) -> str:
    """What to type for a program of this environment: its path where the environment lies below this folder."""
    folder, here = Path(sys.prefix), Path.cwd()
    return str(folder.relative_to(here) / "bin" / name) if folder.is_relative_to(here) else name


def main(parse: Callable[[], Config], run: Callable[[Config], None]) -> None:
    """Parse flags, run, and turn what can go wrong into one line and an exit code."""
    try:
        run(parse())
    except UsageError as error:
        code, line = 2, f"error: {error}"
    except NonFiniteError as error:
        code, line = 4, f"error: {error}"
    except CheckpointError as error:
        code, line = 5, f"error: {error}"
    except Interrupted as signal:
        code, line = signal.code, str(signal)
    except KeyboardInterrupt:
        code, line = 130, "interrupted; nothing was saved after the last checkpoint"
    else:
        return
    print(line, file=sys.stderr)
    raise SystemExit(code)
