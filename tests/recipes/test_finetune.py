"""Fine-tuning: a published model on conversations, from its folder to a checkpoint, whatever the rule."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.chats import GENERATION, turns
from helpers.finetuning import FLAGS, folder, rows, write
from helpers.grids import few
from helpers.runs import assert_identical, column, here, interrupted, killed, refused, tool
from rich.console import Console

from engine.data.chat.packing import IGNORED
from engine.loop.best import best, kept
from engine.step.segments import Chain, cut
from models import weights
from optimizers.contract import idle
from recipes.build import build
from recipes.finetune import RATE, Finetune
from recipes.registry import parsed
from recipes.train import material_of

LINE = FLAGS + "--steps 6 --eval-every 2 --save-every 3 "


def config(line: str, at: Path) -> Finetune:
    recipe, _, *flags = line.split()
    found = parsed([recipe, str(at / "model"), *flags], "test")
    assert isinstance(found, Finetune)
    return found


@pytest.mark.run
def test_a_run_shows_an_example_evaluates_samples_and_keeps_the_best(tmp_path: Path) -> None:
    done = here(folder(tmp_path), LINE + "--general general.txt --lr 1e-3 --optimizer sumo --rank 4 --out run")
    assert done.code == 0, done
    example = done.out.index("<|im_start|>assistant\n⟦is 0<|im_end|>⟧")
    assert (
        done.out.index("format: messages") < example < done.out.index("sample 1 at step 0") < done.out.index("step 6/6")
    )
    run = tmp_path / "run"
    for name in ("eval/loss", "eval/accuracy", "eval/general"):
        assert [step for step, _ in column(run, name)] == [0, 2, 4, 6], name
    losses = dict(column(run, "eval/loss"))
    assert losses[6] < losses[0]
    lowest = min((loss, step) for step, loss in losses.items())[1]
    assert f"best         run/step-{int(lowest):08d}" in done.out
    assert "general text, nats per token: " in done.out and "tools.generate run --chat" in done.out
    assert (run / "tokenizer/chat_template.jinja").is_file()
    events = b"".join(file.read_bytes() for file in run.rglob("events.*"))
    assert events.count(b"sample/1/text_summary") == 4, "TensorBoard has the sample of each evaluation"


@pytest.mark.run
def test_about_two_in_a_hundred_are_held_out_unless_it_is_said(tmp_path: Path) -> None:
    write(folder(tmp_path) / "chats.jsonl", rows(200))
    for flags, least, most in (("", 3, 5), ("--validation-fraction 0.2", 35, 45)):
        done = here(tmp_path, f"{LINE} --dry-run {flags} --out run")
        held = int(done.out.split("held out: ")[1].split(" of 200 examples")[0])
        assert done.code == 0 and least <= held <= most, done
    assert tool(tmp_path, "tools.prepare made --chat --data chats.jsonl --tokenizer model").code == 0
    line = refused(here(tmp_path, f"{LINE} --data made --validation-fraction 0.2 --out run"), 2)
    assert "made was prepared with what it holds out" in line


@pytest.mark.run
@pytest.mark.parametrize("end", few(["interrupted", "killed"], "interrupted"))
def test_a_run_that_was_cut_off_ends_as_one_that_was_left_alone(tmp_path: Path, end: str) -> None:
    folder(tmp_path)
    line = FLAGS + "--eval-every 50 --save-every 2 --schedule constant --warmup 0 --general general.txt "
    line += "--optimizer omgd --active 1 --period 3step "
    if end == "killed":
        killed(tmp_path, f"{line} --out parts --steps 4000", "parts/step-00000004")
    else:
        interrupted(tmp_path, f"{line} --out parts --steps 4000", 4)
    last = max(int(path.name[5:]) for path in (tmp_path / "parts").glob("step-*")) + 5
    for flags in ("--out parts --resume auto", "--out whole"):
        done = here(tmp_path, f"{line} {flags} --steps {last}")
        assert done.code == 0, done
    assert_identical(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.run
def test_a_run_ends_early_and_its_best_checkpoint_stays(tmp_path: Path) -> None:
    """At a rate that destroys the model, and then from there: nothing is left to do."""
    folder(tmp_path)
    line = LINE.replace("--eval-every 2", "--eval-every 1") + "--patience 2 --keep-last 1 --lr 0.5 --warmup 0 --out run"
    done = here(tmp_path, line)
    assert done.code == 0, done
    losses = dict(column(tmp_path / "run", "eval/loss"))
    least = min(losses, key=losses.__getitem__)
    assert f"held-out loss {losses[least]:.4f} at step {int(least)} was not bettered in 2 evaluations" in done.out
    assert max(losses) == least + 2 < 6
    steps = {int(path.name[5:]) for path in (tmp_path / "run").glob("step-*")}
    trained = {step: loss for step, loss in losses.items() if step}
    assert steps == {int(min(trained, key=trained.__getitem__)), int(max(losses))}
    again = here(tmp_path, f"{line} --resume auto")
    assert again.code == 0 and "stopped early" in again.out, again
    assert dict(column(tmp_path / "run", "eval/loss")) == losses


def test_the_best_of_a_history() -> None:
    history = [{"step": s, "eval/loss": v} for s, v in ((0, 1.0), (2, 3.0), (4, 2.0), (6, 2.0), (8, float("nan")))]
    assert best(history) == (0, 1.0, 4) and kept(history) == 4
    assert best([{"step": 1, "train/loss": 1.0}]) is None and kept(history[:1]) is None


@pytest.mark.parametrize("name", few(Finetune.rules(), "adamw", "sumo", "rso", "omgd+sumo", "rso+snsm"))
def test_every_rule_can_fine_tune_and_be_planned(tmp_path: Path, name: str) -> None:
    options = Finetune.defaults(name)
    ranks = [n for n in ("rank", "inner_rank") if hasattr(options, n) and n not in idle(options)]
    rank = " ".join(f"--{n.replace('_', '-')} 4" for n in ranks)
    found = config(f"finetune model --data x --sequence 48 --optimizer {name} {rank}", folder(tmp_path))
    run = build(found, 320)
    assert set(run.optimizer.owner) == set(run.params)
    state = run.optimizer.init(run.params)
    assert all(t.is_meta for slots in state.values() for t in slots.values())


def test_rates_are_carried_over_unless_one_is_given(tmp_path: Path) -> None:
    folder(tmp_path)

    def rates(flags: str) -> tuple[float, float | None]:
        found = config(f"finetune model --data x --sequence 48 {flags}", tmp_path)
        return found.lr, found.rest_lr

    assert rates("") == rates("--optimizer muon") == rates("--optimizer rso") == (RATE, None)
    assert rates("--optimizer adam_snsm") == (10 * RATE, RATE)
    assert rates("--optimizer galore --lr 1e-3") == (1e-3, RATE)
    notes = build(config("finetune model --data x --sequence 48 --optimizer galore --rank 4", tmp_path), 320).notes
    assert "a guess from AdamW's" in notes[0]
    assert not build(config("finetune model --data x --sequence 48 --lr 1e-3", tmp_path), 320).notes


def test_a_preset_and_how_long_it_trains(tmp_path: Path) -> None:
    found = config("finetune model --data x --preset sumo-gsm8k --sequence 48", folder(tmp_path))
    assert (found.optimizer, found.options.rank, found.epochs, found.pack) == ("sumo", 64, 10.0, False)
    assert found.micro_batch * found.accumulation == 32
    assert found.settled(7).steps == 70
    steps = config("finetune model --data x --preset sumo-gsm8k --sequence 48 --steps 5", tmp_path)
    assert steps.settled(7).steps == 5


def test_evaluation_is_what_the_model_says_itself(tmp_path: Path) -> None:
    """Loss and accuracy of answers, and the loss of general text, from plain logits, a row at a time."""
    folder(tmp_path)
    model = weights.load(tmp_path / "model")
    console = Console(quiet=True)
    flags = "--sequence 48 --general general.txt --no-pack --micro-batch 3 --data chats.jsonl"
    at = os.getcwd()
    os.chdir(tmp_path)
    try:
        found = config(f"finetune model {flags}", tmp_path)
        material = material_of(found, console)
        task = material.task(build(found, 320))
    finally:
        os.chdir(at)
    sums = {"loss": 0.0, "accuracy": 0.0, "general": 0.0}
    counts = dict.fromkeys(sums, 0)
    chain, params = Chain(cut(model), logits=320 * 5), dict(model.named_parameters())
    total: dict[str, torch.Tensor] = {}
    for batch in task.evaluation(3):
        for name, value in task.evaluate(chain, params, batch).items():
            total[name] = total.get(name, torch.zeros(2)) + value
        for ids, targets in zip(batch["input_ids"], batch["targets"], strict=True):
            length = int((targets != IGNORED).nonzero().max()) + 1 if (targets != IGNORED).any() else 0
            if not length:
                continue
            logits = model(ids[None, :length])[0]
            losses = F.cross_entropy(logits, targets[:length], ignore_index=IGNORED, reduction="sum").item()
            name, known = ("general" if "general" in batch else "loss"), int((targets != IGNORED).sum())
            sums[name] += losses
            counts[name] += known
            if name == "loss":
                sums["accuracy"] += int((logits.argmax(-1) == targets[:length]).sum())
                counts["accuracy"] += known
    got = task.report(total)
    for name, value in sums.items():
        assert got[name] == pytest.approx(value / counts[name], rel=1e-4), name


def test_a_plan_knows_the_fields_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder(tmp_path))
    found = config("finetune model --data chats.jsonl --sequence 48", tmp_path)
    batch = material_of(found, Console(quiet=True)).task(build(found, 320)).batch(0, 2)
    blank = found.blank(2)
    assert blank.keys() == batch.keys() and all(blank[n].dtype == t.dtype for n, t in batch.items())


BAD = {
    "finetune --data chats.jsonl": "MODEL: got none; give the folder of a model",
    "finetune nowhere --data chats.jsonl": "MODEL nowhere: is no folder",
    "finetune model --data chats.jsonl --epochs 0": "--epochs: got 0, expected a number above 0; --steps counts",
    "finetune model --data chats.jsonl --steps 3 --epochs 2": "--epochs and --steps say the same; give one of them",
    "finetune model --data chats.jsonl --preset x": "--preset: got 'x', expected one of none, sumo-gsm8k, sumo-mawps",
    "finetune model --data chats.jsonl --optimizer omgd+sum": "'omgd+sum', expected one of adamw, ",
    "finetune model --data chats.jsonl --optimizer rso+adamw --inner-rank 4": "--inner-rank: rso+adamw has no such",
    "finetune model --data chats.jsonl --freeze embed typo": "freeze: pattern 'typo' matches no parameter",
    "finetune model --data chats.jsonl --validation chats.jsonl --validation-fraction 0.1": "changes nothing beside",
    "finetune model --data chats.jsonl --validation-fraction 0.6": "validation_fraction: got 0.6; expected more than 0",
    "finetune model --data chats.jsonl --freeze .": "match every parameter, so there is nothing to train; freeze fewer",
    "finetune model --data chats.jsonl --sequence 8": "chats.jsonl, line ",
    "finetune model --data empty.jsonl": "empty.jsonl, line 1: message 2 (assistant) is empty",
    "finetune strict --data role.jsonl": "role.jsonl, line 1: message 2: the chat template writes nothing of a",
    "finetune strict --data alone.jsonl": "alone.jsonl, line 2: no message of the assistant to train on (roles: user)",
    "finetune model --data long.jsonl": "sequence of 48 tokens; the longest, long.jsonl, line 1, has 100,0",
    "finetune model --data long.jsonl --longer cut": "long.jsonl, line 1: cut to 48 tokens, of which none is trained;",
    "finetune other --data chats.jsonl": "q_proj.weight: got the shape [64, 32], expected [128, 32] by config.json;",
    "finetune model --data chats.jsonl --tokenizer large": "expected at most 320, that of the model in model",
    "finetune bare --data chats.jsonl": "needs a chat template, and bare has none",
    "finetune model --data chats.jsonl --optimizer omgd --rank 4": "--rank: omgd has no such option",
    "finetune model --data chats.jsonl --general short.txt": "--general: ",
}


@pytest.mark.run
@pytest.mark.parametrize("line", BAD)
def test_what_is_refused(tmp_path: Path, line: str) -> None:
    folder(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "bare")
    write(tmp_path / "empty.jsonl", [{"messages": turns("a", "")}])
    narrated = [*turns("a"), {"role": "narrator", "content": "b"}, {"role": "assistant", "content": "c"}]
    write(tmp_path / "role.jsonl", [{"messages": narrated}, *rows(2)])
    write(tmp_path / "alone.jsonl", [*rows(1), {"messages": turns("a")}])
    write(tmp_path / "long.jsonl", [{"messages": turns("x" * 100_000, "y")}, *rows(3)])
    shutil.copytree(tmp_path / "model", tmp_path / "strict")
    (tmp_path / "strict/chat_template.jinja").write_text(GENERATION)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    shape = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(shape | {"head_dim": 32}))
    (tmp_path / "short.txt").write_text("a b")
    tokens = json.loads((tmp_path / "model/tokenizer.json").read_text())
    shutil.copytree(tmp_path / "bare", tmp_path / "large")
    (tmp_path / "bare/chat_template.jinja").unlink()
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = len(tokens["model"]["vocab"])
    tokens["added_tokens"] += [{"id": i, "content": f"<|{i}|>", **plain} for i in range(first, 400)]
    (tmp_path / "large/tokenizer.json").write_text(json.dumps(tokens))
    sequence = "" if "--sequence" in line else "--sequence 48"
    assert BAD[line] in refused(here(tmp_path, f"{line} {sequence} --compile off --out run"), 2)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    gone = max((tmp_path / "model").glob("*.safetensors"))
    gone.unlink()
    assert f"{gone.name}: is not there" in refused(here(tmp_path, f"{LINE} --out run"), 2)


@pytest.mark.run
def test_another_optimizer_goes_on_unless_the_run_has_ended_early(tmp_path: Path) -> None:
    folder(tmp_path)
    line = (
        LINE.replace("--eval-every 2", "--eval-every 1") + '--swap-at 4 "finetune model --optimizer sgd --sequence 48" '
    )
    done = here(tmp_path, line + "--lr 1e-4 --out run")
    assert done.code == 0 and [step for step, _ in column(tmp_path / "run", "eval/loss")] == [*range(7)], done
    done = here(tmp_path, line + "--lr 0.5 --warmup 0 --patience 1 --out early")
    assert done.code == 0 and "stopped early" in done.out, done
    assert max(step for step, _ in column(tmp_path / "early", "eval/loss")) < 4


@pytest.mark.run
def test_a_plan_needs_the_shape_of_a_model_and_a_run_its_weights(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "shape").mkdir()
    shutil.copyfile(tmp_path / "model/config.json", tmp_path / "shape/config.json")
    line = "--data chats.jsonl --sequence 48 --compile off --optimizer omgd"
    plans = [json.loads(tool(tmp_path, f"tools.plan finetune {at} {line} --json").out) for at in ("model", "shape")]
    assert plans[0] == plans[1] and plans[0]["asked"]["bytes"] > 0
    assert "shape: got no weights" in refused(here(tmp_path, f"finetune shape {line} --out run"), 2)
