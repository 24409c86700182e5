"""From a config to a finished run: what all recipes that train share."""

import dataclasses
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from engine.atomic import write_whole
from engine.checkpoint import Reader
from engine.data import Tokens, tokenizer_of
from engine.data.prepare import cached
from engine.data.prompt import prompt_ids
from engine.data.request import Request
from engine.data.tokenizer import KEPT, Tokenizer
from engine.fit import plain_console, resume
from engine.inspection.receipt import receipt
from engine.loop.folder import device_of, leave_branch, place
from engine.loop.metrics import FILE, Metrics
from engine.loop.result import evaluations, write_result
from engine.loop.trainer import Trainer
from engine.tasks.language import LanguageTask
from engine.terminal.attempt import attempt
from engine.terminal.command import pasted, program
from engine.terminal.progress import Bar
from models.sampling import generate
from optimizers.compile import can_compile

from . import init
from .build import Run, build
from .config import TrainConfig
from .plan import planned
from .registry import trained_by
from .swap import continued, plain, report, source


class Text(NamedTuple):
    """What a language model is trained on."""

    tokens: Tokens
    held_out: Tokens
    tokenizer: Tokenizer


def train(config: TrainConfig, saved: Reader | None = None) -> Path:
    """One run from start to picture and sample, also where it goes on under another optimizer; returns its folder.

    `saved` is the checkpoint that `config.resume` names, where the caller has opened it already. Raises UsageError,
    CheckpointError, NonFiniteError, Interrupted.
    """
    console = plain_console()
    while True:
        out, following = _train(config, console, saved)
        if following is None:
            return out
        config, saved = following, None
        gc.collect()  # the first optimizer's state is gone before the second one's is made
        torch.compiler.reset()


def _train(config: TrainConfig, console: Console, saved: Reader | None) -> tuple[Path, TrainConfig | None]:
    """A run under one optimizer: its folder, and the config that goes on where --swap-at asks for one."""
    config.check()
    device = device_of(config.device)
    stem = Path("runs") / "-".join(filter(None, [config.recipe, config.trains, config.named]))
    with place(config, stem, console.print, config.dry_run, saved) as (out, found):
        return _trained(config, console, device, out, found)


def _trained(
    config: TrainConfig, console: Console, device: torch.device, out: Path, saved: Reader | None
) -> tuple[Path, TrainConfig | None]:
    """In `out`, which is this process's own, from the checkpoint `saved`, if any."""
    if config.compile != "off" and (reason := can_compile(device)):
        console.print(f"{reason}: running uncompiled, which is slower")
        config = dataclasses.replace(config, compile="off")
    text = _read(config, console)
    size = config.micro_batch * config.accumulation
    positions = config.shape(text.tokenizer.vocab_size).max_position_embeddings
    prompt, remark = prompt_ids(text.tokenizer, config.prompt, positions)
    if remark:
        console.print(remark)
    run = build(config, text.tokenizer.vocab_size, -(-_rows(config, text) // size))
    task = LanguageTask(
        run.model,
        text.tokens,
        text.held_out,
        config.sequence,
        config=run.model.config.to_hf(),
        seed=config.seed,
        align=size if config.align else 1,
        eval_windows=config.eval_windows,
        apart=config.documents == "apart",
    )
    _introduce(run, task, text, console)
    if config.dry_run:
        return out, None
    trainer = _prepared(run, task, out, saved, device, console)
    _own(out, saved, trainer, text.tokenizer, console)
    until = config.swap_at[0] if config.swap_at and config.swap_at[0] > trainer.done else config.steps
    if trainer.converted:
        path = trainer.save_now()
        console.print(f"converted    {path}")
        console.print(f"report       {attempt(lambda: _report(trainer, out / 'swap.json'), 'written')}")
        if config.swap == "only":
            return out, None
    with Metrics(out, trainer.done, config.steps, console) as metrics:
        found = trainer.train(metrics, until)
    if config.swap_at and until < config.steps:
        return out, continued(config, out / f"step-{until:08d}")
    _finish(run, trainer, metrics, found, text.tokenizer, prompt, console)
    return out, None


def _read(config: TrainConfig, console: Console) -> Text:
    """The prepared text, long enough for a sequence. Raises UsageError."""
    bar = Bar(console)
    with bar.progress:
        request = Request(
            config.data,
            config.validation,
            config.tokenizer,
            config.eos,
            config.allow_unknown,
            config.field,
            config.allow_malformed,
        )
        folder = cached(Path("runs/.data"), request, bar)
    text = Text(Tokens(folder), Tokens(folder, "validation"), tokenizer_of(folder))
    for tokens in (text.tokens, text.held_out):
        tokens.windows(config.sequence)
    return text


def _rows(config: TrainConfig, text: Text) -> int:
    return text.tokens.windows(config.sequence)


def _introduce(run: Run, task: LanguageTask, text: Text, console: Console) -> None:
    """Say who trains what on how much text. Nothing has memory yet."""
    config, tokens, tokenizer = run.config, text.tokens, text.tokenizer
    for note in run.notes:
        if note.startswith("warning"):
            print(note, file=sys.stderr)
        else:
            console.print(note)
    console.print(receipt(run.optimizer, run.params, run.optimizer.init(run.params)))
    documents = f"{tokens.documents:,} document" + "s" * (tokens.documents != 1)
    size = config.micro_batch * config.accumulation
    console.print(
        f"{len(tokens):,} training tokens in {documents}, {len(text.held_out):,} held out "
        f"({tokenizer.name}, vocabulary {tokenizer.vocab_size}); a step takes "
        f"{size * config.sequence:,}, the run "
        f"{config.steps * size / task.rows:.2f} epochs; an evaluation reads "
        f"{min(config.eval_windows, task.held_out.windows):,} of {task.held_out.windows:,} held-out sequences, evenly "
        "spaced",
    )


def _prepared(
    run: Run, task: LanguageTask, out: Path, saved: Reader | None, device: torch.device, console: Console
) -> Trainer:
    """The trainer, with fresh weights and state or those of a checkpoint: never both. Raises CheckpointError."""
    trainer = run.trainer(task, out, device, fresh=saved is None)
    if saved is None:
        return trainer
    theirs = source(saved, run, trained_by(saved)) if run.config.swap != "never" else None
    resume(trainer, saved, console, theirs)
    if theirs:
        console.print(report(trainer.converted))
    return trainer


def _own(out: Path, saved: Reader | None, trainer: Trainer, tokenizer: Tokenizer, console: Console) -> None:
    """Set another branch aside, and put into the folder what says how to read and repeat the run. Raises WriteError."""
    leave_branch(out, saved, trainer.done, trainer.config, console.print)
    if tokenizer.files:  # a run can be read wherever it lies
        (out / KEPT).mkdir(exist_ok=True)
        tokenizer.copy_to(out / KEPT)
        asked = trainer.config
        if isinstance(asked, TrainConfig) and asked.init is not None and asked.tokenizer == str(asked.init):
            init.keep_beside(asked.init, out / KEPT)
    config = trainer.config.plain()
    write_whole(out / "config.json", json.dumps(config, indent=1) + "\n")
    console.print(f"config: {json.dumps(config)}", style="dim")


def _report(trainer: Trainer, file: Path) -> str:
    write_whole(file, json.dumps(plain(trainer.converted), indent=1) + "\n")
    return str(file)


# After the last checkpoint: the run is trained and saved, and whatever fails now is a line.


def _finish(
    run: Run,
    trainer: Trainer,
    metrics: Metrics,
    held_out: Mapping[str, float],
    tokenizer: Tokenizer,
    prompt: list[int],
    console: Console,
) -> None:
    """Numbers, picture, prediction and sample, each a line that says where it is or why it is not."""
    config, out = run.config, trainer.out
    console.print(f"held-out loss {held_out['loss']:.4f} {trainer.task.loss_unit}")
    console.print(f"checkpoint   {trainer.saved}")
    for name, not_done, told in (
        ("loss curve", "drawn", lambda: _curve(run, trainer, metrics, held_out)),
        ("numbers", "written", lambda: f"{out / FILE}, {write_result(trainer, metrics, held_out)}"),
        ("look at it", "said", lambda: pasted(program("tensorboard"), "--logdir", out)),
        (
            "more text",
            "said",
            lambda: pasted(program("python"), "-m", "tools.generate", out, f"--prompt={config.prompt}"),
        ),
        ("memory", "predicted", lambda: _memory(run, trainer)),
        ("sample", "drawn", lambda: _sample(run, trainer, tokenizer, prompt, console)),
    ):
        if line := attempt(told, not_done):
            console.print(f"{name:12} {line}")


def _curve(run: Run, trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float]) -> str:
    from engine.curves import loss_curve  # slow to import

    out, label = trainer.out, run.config.trains or "loss"
    curve = [(int(r["step"]), r["train/loss"]) for r in metrics.history if "train/loss" in r]
    points = evaluations(trainer, metrics, held_out)
    trained, evaluated = (([s for s, _ in rows], [y for _, y in rows]) for rows in (curve, points))
    title = f"{out.name}: loss in {trainer.task.loss_unit}"
    return str(loss_curve(out / "loss.png", {label: trained}, title, held_out={label: evaluated}))


def _memory(run: Run, trainer: Trainer) -> str:
    """What the planner predicted of the last step (on CUDA: of the run), and what was counted."""
    if not trainer.measured:
        return ""
    cuda = trainer.step.device.type == "cuda"
    found = planned(run.config, run.model.config.vocab_size, run.epoch, trainer.step.device.type, trainer.done - 1)
    own = found.bytes - found.kinds.get("CUDA context (assumed)", 0)
    return (
        f"predicted {own / 2**30:.3f} GiB of tensors at the peak ({found.moment}), measured "
        f"{trainer.measured / 2**30:.3f} GiB" + ("" if cuda else " in the last step")
    )


def _sample(run: Run, trainer: Trainer, tokenizer: Tokenizer, prompt: list[int], console: Console) -> str:
    """Print what the model makes of the prompt, with the weights that it has without its optimizer."""
    step = trainer.step
    for name, p in step.params.items():
        own = {name: step.state[name]} if name in step.state else {}
        p.data.copy_(run.optimizer.merge({name: p}, own)[name])
    seed, eos = run.config.seed, tokenizer.eos
    drawn = generate(run.model.eval(), prompt, 200, temperature=0.8, top_k=50, seed=seed, eos=eos)
    said = tokenizer.decode([*prompt, *drawn])
    console.rule("a sample")
    console.print(said)
    console.rule()
    return ""
