"""From flags to a finished run: what all training recipes share.

Exit codes: 0 done, 1 failure, 2 bad arguments, 4 non-finite loss, 5 incompatible checkpoint, 130 interrupted and saved.
"""

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor

from engine import checkpoint, output, paths, signals
from engine.checkpoint import CheckpointError
from engine.command import pasted, program
from engine.compile import can_compile
from engine.data import Tokens, tokenizer_of
from engine.data.prepare import Request, cached
from engine.data.prompt import prompt_ids
from engine.data.tokenizer import load_tokenizer
from engine.memory import peak_bytes
from engine.metrics import Metrics
from engine.place import device_of, leave_branch, place
from engine.plan import Built, cast, plan
from engine.receipt import receipt
from engine.segments import cut
from engine.step import Step
from engine.tasks.language import LanguageTask
from engine.trainer import Interrupted, NonFiniteError, Trainer
from models.llama import PRESETS, Llama
from models.sampling import generate
from optimizers.contract import UsageError, total_bytes
from optimizers.partition import freeze
from optimizers.random import fold
from tools.generate import TOKENIZER
from tools.inspect import inspect_fresh, write
from tools.plan import Planned, answer
from tools.plot import loss_curve
from tools.prepare import Bar

from .config import Setup, TrainConfig
from .swap import go_on, plain, report, source

Config = TypeVar("Config")


def train(config: TrainConfig) -> Path:
    """One run from start to picture and sample; returns its folder.

    Raises UsageError, CheckpointError, NonFiniteError, Interrupted.
    """
    config.check()
    if config.plan:
        raise _instead(config)
    watched = sys.stdout.isatty()  # what is printed are paths, patterns and samples: nothing in them is markup
    console = Console(soft_wrap=not watched, width=None if watched else 160, markup=False, emoji=False, highlight=False)
    device = device_of(config.device)
    stem = Path("runs") / "-".join(filter(None, [config.recipe, getattr(config, "optimizer", ""), config.model]))
    with place(config, stem, console.print, config.dry_run) as (out, saved):
        return _train(config, console, device, out, saved)


def _train(config: TrainConfig, console: Console, device: torch.device, out: Path, saved: Path | None) -> Path:
    """In `out`, which is this process's own, from the checkpoint `saved`, if any."""
    if config.compile != "off" and (reason := can_compile(device)):
        console.print(f"{reason}: running uncompiled, which is slower")
        config = dataclasses.replace(config, compile="off")

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
    tokens, held_out, tokenizer = Tokens(folder), Tokens(folder, "validation"), tokenizer_of(folder)
    size = config.micro_batch * config.accumulation
    for text in (tokens, held_out):
        text.windows(config.sequence)  # long enough: before a model is made

    shape = config.shape(tokenizer.vocab_size)
    prompt, remark = prompt_ids(tokenizer, config.prompt, shape.max_position_embeddings)
    if remark:
        console.print(remark)
    model = Llama(shape, seed=config.seed).to(device)
    if config.precision.startswith("bf16"):
        model.to(torch.bfloat16)
    params: dict[str, Tensor] = dict(model.named_parameters())
    freeze(params, config.freeze)
    key = fold(config.seed, "optimizer")
    task = LanguageTask(
        model,
        tokens,
        held_out,
        config.sequence,
        config=shape.to_hf(),
        seed=config.seed,
        align=size if config.align else 1,
        eval_windows=config.eval_windows,
    )
    setup = Setup(model, params, -(-task.rows // size), key)
    optimizer = config.optimizer_for(setup)
    state = optimizer.init(params)
    step = Step(
        task.segments(),
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
        f"{config.steps * size / task.rows:.2f} epochs; an evaluation reads "
        f"{min(config.eval_windows, task.held_out.windows):,} of {task.held_out.windows:,} held-out sequences, evenly "
        "spaced",
    )
    if config.dry_run:
        return out
    config = dataclasses.replace(config, out=out)
    trainer = Trainer(config, step, task, out)
    changed: list[str] = []
    if saved:  # before anything of the run is overwritten
        whole = checkpoint.load(saved)
        theirs = source(whole, setup) if config.swap != "never" else None
        changed = trainer.resume(whole, theirs)
        if theirs:
            console.print(report(trainer.converted))
    leave_branch(out, saved, trainer.done, config, console.print)
    if tokenizer.files:  # a run can be read wherever it lies
        (out / TOKENIZER).mkdir(exist_ok=True)
        tokenizer.copy_to(out / TOKENIZER)
    (out / "config.json").write_text(json.dumps(config.plain(), indent=1) + "\n", encoding="utf-8")
    console.print(f"config: {json.dumps(config.plain())}", style="dim")
    if saved:
        differs = f"; changed: {', '.join(changed)}" if changed else ""
        console.print(f"resuming {saved} at step {trainer.done}{differs}")
        for note in trainer.notes:
            console.print(note)
    until = config.swap_at[0] if config.swap_at and config.swap_at[0] > trainer.done else config.steps
    if trainer.converted:
        path = trainer.save_now()
        (out / "swap.json").write_text(json.dumps(plain(trainer.converted), indent=1) + "\n", encoding="utf-8")
        console.print(f"converted    {path}, {out / 'swap.json'}")
        if config.swap == "only":
            return out
    with Metrics(out, trainer.done, config.steps, console) as metrics:
        found = trainer.train(metrics, until)
    if config.swap_at and until < config.steps:
        go_on(config, out / f"step-{until:08d}")
    _finish(config, trainer, metrics, found, console)
    if trainer.measured:
        console.print(_memory(config, trainer, tokenizer.vocab_size, setup.epoch))
    for name, p in optimizer.merge(params, step.state).items():
        params[name].data.copy_(p)
    drawn = generate(model.eval(), prompt, 200, temperature=0.8, top_k=50, seed=config.seed, eos=tokenizer.eos)
    try:
        sample = tokenizer.decode([*prompt, *drawn])
    except (FloatingPointError, torch.OutOfMemoryError) as error:  # the run is done and saved: no reason to fail
        console.print(f"no sample: {error}")
        return out
    console.rule("a sample")
    console.print(sample)
    console.rule()
    return out


def _memory(config: TrainConfig, trainer: Trainer, vocabulary: int, epoch: int) -> str:
    """What the planner predicted of the last step (on CUDA: of the run), and what was counted."""
    assert trainer.measured is not None
    cuda = trainer.step.device.type == "cuda"
    steps = () if cuda else (trainer.done - 1,)
    planned = _planned(config, vocabulary, epoch, trainer.step.device.type, steps).plan
    own = planned.bytes - planned.kinds.get("CUDA context (assumed)", 0)
    return (
        f"memory       predicted {own / 2**30:.3f} GiB of tensors at the peak ({planned.moment}), measured "
        f"{trainer.measured / 2**30:.3f} GiB" + ("" if cuda else " in the last step")
    )


def _instead(config: TrainConfig) -> Planned | SystemExit:
    """What is asked for in the place of training: the memory that it takes, or what it would save at its start."""
    asked = json.loads(config.plan)
    if "inspect" not in asked:
        return _planned(config, asked["vocabulary"])
    with torch.device("meta"):
        built = _built(config, _vocabulary(config))
        report = inspect_fresh(f"recipes.{asked['inspect']}", built.params, built.optimizer, asked["match"])
    try:
        write(report, asked["json"], Path(asked["png"]) if asked["png"] else None)
    except OSError as error:
        return SystemExit(f"error: {error}")
    return SystemExit(0)


def _planned(
    config: TrainConfig, vocabulary: int = 0, epoch: int = 1000, device: str = "", steps: Sequence[int] = ()
) -> Planned:
    """The memory of this run, predicted. `epoch`, steps in a pass over the data, only matters to what turns."""
    vocabulary = vocabulary or _vocabulary(config)
    device = device or (config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    kind = device.partition(":")[0]
    return Planned(plan(lambda: _built(config, vocabulary, epoch), config, kind, steps), kind)


def _vocabulary(config: TrainConfig) -> int:
    """That of the tokenizer, or without one of the preset."""
    byte = config.tokenizer == "byte"
    return PRESETS[config.model].vocab_size if byte else load_tokenizer(config.tokenizer, config.eos).vocab_size


def _built(config: TrainConfig, vocabulary: int, epoch: int = 1000) -> Built:
    """What a run trains, on whatever tensors are made here: fake ones, or some without memory."""
    model = Llama(config.shape(vocabulary), seed=config.seed)
    if config.precision.startswith("bf16"):
        cast(model, torch.bfloat16)
    params: dict[str, Tensor] = dict(model.named_parameters())
    freeze(params, config.freeze)
    setup = Setup(model, params, epoch, fold(config.seed, "optimizer"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # recipes say things
        optimizer = config.optimizer_for(setup)
    return Built(cut(model), params, optimizer)


def _finish(
    config: TrainConfig, trainer: Trainer, metrics: Metrics, held_out: Mapping[str, float], console: Console
) -> None:
    """The loss curve, and where everything is."""
    out, task = trainer.out, trainer.task
    curve = [(int(r["step"]), r["train/loss"]) for r in metrics.history if "train/loss" in r]
    points = [(int(r["step"]), r["eval/loss"]) for r in metrics.history if "eval/loss" in r]
    points = points or [(trainer.done, held_out["loss"])]  # a finished run, resumed in another folder, trained nothing
    label = getattr(config, "optimizer", "loss")
    trained, evaluated = (([s for s, _ in rows], [y for _, y in rows]) for rows in (curve, points))
    title = f"{out.name}: loss in {task.loss_unit}"
    loss_curve(out / "loss.png", {label: trained}, title, held_out={label: evaluated})
    rates = [r[key] for r in metrics.history if (key := f"train/{task.unit}_per_second") in r]
    units = task.units(config.micro_batch * config.accumulation)
    result = {
        "steps": trainer.done,
        task.unit: trainer.trained,
        **{f"eval/{name}": value for name, value in held_out.items()},
        "curve": points,
        "state_bytes": total_bytes(trainer.step.state),
        "peak_bytes": peak_bytes(trainer.step.device),
        "seconds_per_step": units / median(rates) if rates else None,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"held-out loss {held_out['loss']:.4f} {task.loss_unit}\n"
        f"checkpoint   {checkpoint.latest(out).path or config.resume}\n"
        f"loss curve   {out / 'loss.png'}\n"
        f"numbers      {out / 'metrics.jsonl'}, {out / 'result.json'}\n"
        f"look at it   {pasted(program('tensorboard'), '--logdir', out)}\n"
        f"more text    {pasted(program('python'), '-m', 'tools.generate', out, f'--prompt={config.prompt}')}"
    )


def main(parse: Callable[[], Config], run: Callable[[Config], object]) -> None:
    """Parse flags, run, and turn what can go wrong into one line and an exit code."""
    output.printable()
    with output.lasting(), signals.raised():
        try:
            config = parse()
            asked = json.loads(getattr(config, "plan", "") or "{}")
            if "fit" in asked:
                raise SystemExit(answer(config, run))
            run(config)
        except UsageError as error:
            code, line = 2, f"error: {error}"
        except NonFiniteError as error:
            code, line = 4, f"error: {error}"
        except CheckpointError as error:
            code, line = 5, f"error: {error}"
        except (Interrupted, signals.Ended) as signal:
            code, line = signal.code, str(signal)
        except OSError as error:
            what = error.filename or "a file"
            code, line = paths.code(error), f"error: {what}: {error.strerror or error}; make room, or name another file"
        except KeyboardInterrupt:
            code, line = 130, "interrupted; nothing was saved after the last checkpoint"
        else:
            return
        print(line, file=sys.stderr)
        raise SystemExit(code)
