"""From a config to a finished run: what all recipes that train share."""

import dataclasses
import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from engine.arithmetic import arithmetic
from engine.atomic import write_whole
from engine.checkpoint import Reader
from engine.fit import plain_console, resume
from engine.inspection.receipt import receipt
from engine.loop.best import best
from engine.loop.folder import device_of, leave_branch, place
from engine.loop.metrics import FILE, Metrics
from engine.loop.result import evaluations, write_result
from engine.loop.trainer import Trainer
from engine.task import Task
from engine.terminal.attempt import attempt
from engine.terminal.command import another, pasted, program
from models.sampling import generate
from optimizers.compile import can_compile

from .build import Run, build
from .chat import ChatConfig
from .config import TrainConfig
from .conversations import Conversations
from .glue import GlueConfig
from .labelled import Labelled
from .masked import Hidden, MaskedConfig
from .material import Material, Text
from .pictures import Pictures
from .plan import planned
from .registry import trained_by
from .swap import continued, plain, report, source
from .vision import VisionConfig


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
    config.check_init()
    with arithmetic(config):
        return _run(config, console, saved)


def _run(config: TrainConfig, console: Console, saved: Reader | None) -> tuple[Path, TrainConfig | None]:
    """The same, with settings that were checked, where the process computes as they say."""
    device = device_of(config.device)
    if config.compile != "off" and (reason := can_compile(device)):
        console.print(f"{reason}: running uncompiled, which is slower")
        config = dataclasses.replace(config, compile="off")
    stem = Path("runs") / "-".join(filter(None, [config.recipe, config.trains, config.named]))
    with place(config, stem, console.print, config.dry_run, saved) as (out, found):  # before data are read for long
        material = material_of(config, console)
        config = material.config.settled(-(-material.rows // (config.micro_batch * config.accumulation)))
        return _trained(config, material, console, device, out, found)


def material_of(config: TrainConfig, console: Console) -> Material:
    """What the run is trained on, read. Raises UsageError."""
    if isinstance(config, ChatConfig):
        return Conversations(config, console)
    if isinstance(config, VisionConfig):
        return Pictures(config, console)
    if isinstance(config, MaskedConfig):
        return Hidden(config, console)
    return Labelled(config, console) if isinstance(config, GlueConfig) else Text(config, console)


def _trained(
    config: TrainConfig, material: Material, console: Console, device: torch.device, out: Path, saved: Reader | None
) -> tuple[Path, TrainConfig | None]:
    """In `out`, which is this process's own, from the checkpoint `saved`, if any."""
    run = build(config, material.vocabulary, -(-material.rows // (config.micro_batch * config.accumulation)))
    task = material.task(run)
    _introduce(run, task, material, console)
    if config.dry_run:
        return out, None
    trainer = _prepared(run, task, out, saved, device, console)
    _own(out, saved, trainer, material, console)
    material.watch(run, task, trainer)
    until = config.swap_at[0] if config.swap_at and config.swap_at[0] > trainer.done else config.steps
    if trainer.converted:
        path = trainer.save_now()
        console.print(f"converted    {path}")
        console.print(f"report       {attempt(lambda: _report(trainer, out / 'swap.json'), 'written')}")
        if config.swap == "only":
            return out, None
    with Metrics(out, trainer.done, config.steps, console) as metrics:
        found = trainer.train(metrics, until)
    if config.swap_at and trainer.done == until < config.steps:  # else it ended early
        return out, continued(config, out / f"step-{until:08d}")
    _finish(run, trainer, metrics, found, material, console)
    return out, None


def _introduce(run: Run, task: Task, material: Material, console: Console) -> None:
    """Say who trains what on what. Nothing has memory yet."""
    for note in run.notes:
        if note.startswith("warning"):
            print(note, file=sys.stderr)
        else:
            console.print(note)
    console.print(receipt(run.optimizer, run.params, run.optimizer.init(run.params)))
    for line in material.in_words(run, task):
        console.print(line)
    material.show(task, console)


def _prepared(run: Run, task: Task, out: Path, saved: Reader | None, device: torch.device, console: Console) -> Trainer:
    """The trainer, with fresh weights and state or those of a checkpoint: never both. Raises CheckpointError."""
    trainer = run.trainer(task, out, device, fresh=saved is None)
    if saved is None:
        return trainer
    theirs = source(saved, run, trained_by(saved)) if run.config.swap != "never" else None
    resume(trainer, saved, console, theirs)
    if theirs:
        console.print(report(trainer.converted))
    return trainer


def _own(out: Path, saved: Reader | None, trainer: Trainer, material: Material, console: Console) -> None:
    """Set another branch aside, and put into the folder what says how to read and repeat the run. Raises WriteError."""
    leave_branch(out, saved, trainer.done, trainer.config, console.print)
    material.keep(out)
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
    material: Material,
    console: Console,
) -> None:
    """Numbers, picture, prediction and sample, each a line that says where it is or why it is not."""
    out = trainer.out
    console.print(f"held-out loss {held_out['loss']:.4f} {trainer.task.loss_unit}")
    console.print(f"checkpoint   {trainer.saved}")
    for name, not_done, told in (
        ("best", "said", lambda: _best(trainer, metrics)),
        ("before, after", "said", lambda: material.told(metrics)),
        ("loss curve", "drawn", lambda: _curve(run, trainer, metrics, held_out)),
        ("numbers", "written", lambda: f"{out / FILE}, {write_result(trainer, metrics, held_out)}"),
        ("look at it", "said", lambda: pasted(program("tensorboard"), "--logdir", out)),
        ("more text", "said", lambda: _more(material, out)),
        ("memory", "predicted", lambda: _memory(run, trainer)),
        ("sample", "drawn", lambda: _sample(run, trainer, material, console)),
    ):
        if line := attempt(told, not_done):
            console.print(f"{name:12} {line}")


def _best(trainer: Trainer, metrics: Metrics) -> str:
    """The checkpoint that --keep-best keeps."""
    found = best(metrics.history)
    if not trainer.config.keep_best or found is None:
        return ""
    where = trainer.out / f"step-{found.step:08d}" if found.step else "the model as it was before the first step"
    return f"{where}, held-out loss {found.loss:.4f}"


def _curve(run: Run, trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float]) -> str:
    from engine.curves import loss_curve  # slow to import

    out, label = trainer.out, run.config.trains or "loss"
    curve = [(int(r["step"]), r["train/loss"]) for r in metrics.history if "train/loss" in r]
    points = evaluations(trainer, metrics, held_out)
    trained, evaluated = (([s for s, _ in rows], [y for _, y in rows]) for rows in (curve, points))
    title = f"{out.name}: loss in {trainer.task.loss_unit}"
    return str(loss_curve(out / "loss.png", {label: trained}, title, held_out={label: evaluated}))


def _more(material: Material, out: Path) -> str:
    """The command that asks the trained model, where it answers with text."""
    asking = material.more(out)
    start, *words = another("tools.generate")
    return pasted(program(start), *words, *asking) if asking else ""


def _memory(run: Run, trainer: Trainer) -> str:
    """What the planner predicted of the last step (on CUDA: of the run), and what was counted."""
    if not trainer.measured:
        return ""
    cuda = trainer.step.device.type == "cuda"
    found = planned(run.config, run.vocabulary, run.epoch, trainer.step.device.type, trainer.done - 1)
    own = found.bytes - found.kinds.get("CUDA context (assumed)", 0)
    return (
        f"predicted {own / 2**30:.3f} GiB of tensors at the peak ({found.moment}), measured "
        f"{trainer.measured / 2**30:.3f} GiB" + ("" if cuda else " in the last step")
    )


def _sample(run: Run, trainer: Trainer, material: Material, console: Console) -> str:
    """Print what the model makes of the prompt, if any, with the weights that it has without its optimizer."""
    if not material.prompt:
        return ""
    tokenizer, prompt, step = material.tokenizer, material.prompt, trainer.step
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
