"""Recipes from the outside: what a run prints and leaves behind, and what it says when it cannot run."""

import json
from itertools import product

import pytest
import torch
from helpers.grids import few
from helpers.runs import TINY, column, corpus, finish, here, refused, start

BASELINES = ("adamw", "sgd", "muon", "galore --rank 4 --update-proj-gap 7")


# What a run leaves behind.


@pytest.mark.run
@pytest.mark.parametrize(
    ("optimizer", "apart"),
    [
        (BASELINES[0], False),
        (BASELINES[3], False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((BASELINES[0], True), *product(BASELINES[1:3], [False]))
        ),
    ],
)
def test_a_run_prints_who_trains_what_and_leaves_its_files(tmp_path, optimizer, apart):
    """In this process, or `apart` in one of its own, as users run it."""
    flags = f"--optimizer {optimizer} --out run --save-every 8 --eval-every 10"
    if apart:
        done = finish(start(corpus(tmp_path), f"baseline {TINY} {flags}"))
    else:
        done = here(corpus(tmp_path), f"baseline {TINY} {flags}", ends=True)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err, "escape codes outside of a terminal"
    assert "Traceback" not in done.err

    said = [done.out.index(text) for text in ("who trains what", '"sequence": 16', "step 20/20", "held-out loss")]
    assert said == sorted(said), "the receipt and the configuration come before the first step"
    rule = optimizer.split()[0]
    table = done.out[: done.out.index("parameters, ")]
    assert rule in table and "norm" in table
    assert "decay" in table

    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000016", "step-00000020"], "keeps the last two"
    for step in run.glob("step-*"):
        files = {"model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"}
        assert {path.name for path in step.iterdir()} == files
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = run.glob("events.out.tfevents.*")
    for name in ("train/loss", "eval/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"):
        assert name.encode() in events.read_bytes(), name
    config, result = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    assert config["recipe"] == "baseline" and config["optimizer"] == rule and config["steps"] == 20
    losses = column(run, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 21))
    assert losses[-1][1] < losses[0][1], "the loss falls"
    assert [step for step, _ in column(run, "eval/loss")] == [10, 20]
    assert result["steps"] == 20 and result["tokens"] == 20 * 2 * 16
    assert result["eval/loss"] == column(run, "eval/loss")[-1][1]
    for path in ("run/step-00000020", "run/loss.png", "run/metrics.jsonl", "run/result.json"):
        assert path in done.out, f"{path} is not named at the end"


@pytest.mark.compiles
@pytest.mark.run
@pytest.mark.slow
def test_a_compiled_run_gives_the_numbers_of_an_uncompiled_one(tmp_path):
    corpus(tmp_path)
    plain = here(tmp_path, f"baseline {TINY} --out plain")
    compiled = finish(start(tmp_path, f"baseline {TINY} --out compiled --compile segments"))
    assert plain.code == compiled.code == 0, compiled.err
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        expected, got = (column(tmp_path / run, name) for run in ("plain", "compiled"))
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [y for _, y in got] == pytest.approx([y for _, y in expected], rel=1e-3)


@pytest.mark.compiles
@pytest.mark.run
@pytest.mark.slow
def test_a_compiled_run_with_other_settings(tmp_path):
    flags = "--recompute --accumulation 2 --precision mixed --clip previous"
    corpus(tmp_path)
    plain = here(tmp_path, f"baseline {TINY} --out plain {flags} --compile off")
    compiled = here(tmp_path, f"baseline {TINY} --compile segments {flags} --out compiled")
    assert plain.code == compiled.code == 0, compiled.err
    expected, got = (column(tmp_path / run, "train/loss") for run in ("plain", "compiled"))
    assert [y for _, y in got] == pytest.approx([y for _, y in expected], rel=1e-2)


@pytest.mark.run
def test_without_a_compiler_a_run_says_so_and_goes_uncompiled(tmp_path):
    empty = corpus(tmp_path) / "empty"
    empty.mkdir()
    flags = TINY.replace("--compile off", "").replace("--steps 20", "--steps 2")
    done = finish(start(tmp_path, f"baseline {flags} --out run", PATH=str(empty)))
    assert done.code == 0, done.err
    (said,) = (line for line in done.out.splitlines() if "compiler" in line)
    assert "no C++ compiler found" in said and "running uncompiled" in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] == "off"
    assert "Traceback" not in done.err


def test_a_dry_run_prints_the_receipt_and_leaves_nothing(tmp_path):
    done = here(corpus(tmp_path), f"baseline {TINY} --out run --dry-run --optimizer galore --rank 4")
    assert done.code == 0, done.err
    assert "who trains what" in done.out and "galore" in done.out
    assert "step 20/20" not in done.out
    assert not (tmp_path / "run").exists()


@pytest.mark.run
def test_nothing_that_is_printed_is_taken_for_markup(tmp_path):
    """Paths, patterns and samples may hold what rich would take for a style, an end of one, or an emoji."""
    corpus(tmp_path)
    (tmp_path / "corpus.txt").rename(tmp_path / "[b]x.txt")
    flags = TINY.replace("--data corpus.txt", "--data './[b]x.txt'").replace("--steps 20", "--steps 2")
    done = here(tmp_path, f"baseline {flags} --out '[red]run' --prompt '[/b]it is :key:'", ends=True)
    assert done.code == 0, done.err
    for text in ("[b]x.txt", "[red]run/step-00000002", "'--prompt=[/b]it is :key:'", "\n[/b]it is :key:"):
        assert text in done.out, text


# Wrong arguments: one line, no traceback, exit code 2.


WRONG = {
    "missing file": ("--data nowhere.txt", ["nowhere.txt"]),
    "missing validation": ("--validation nowhere.txt", ["nowhere.txt"]),
    "empty file": ("--data empty.txt", ["empty"]),
    "unknown tokenizer": ("--tokenizer nowhere.json", ["nowhere.json"]),
    "sequence longer than the corpus": ("--sequence 100000", ["sequence", "got 100000", "tokens"]),
    "rank above a side": (
        "--optimizer galore --rank 17",
        ["model.layers.0.self_attn.q_proj.weight", "(16, 16)", "got 17", "[1, 16]"],
    ),
    "rank of nothing": ("--optimizer galore --rank 0", ["q_proj", "got 0", "[1, 16]"]),
    "gap of nothing": ("--optimizer galore --rank 4 --update-proj-gap 0", ["--update-proj-gap", "at least 1", "got 0"]),
    "heads that do not divide": ("--size.num-attention-heads 3", ["hidden_size", "got 16", "num_attention_heads"]),
    "key heads that do not divide": ("--size.num-key-value-heads 3", ["num_key_value_heads", "got 3"]),
    "no layers": ("--size.num-hidden-layers 0", ["num_hidden_layers", "got 0"]),
    "warm-up longer than the run": ("--warmup 21", ["warmup", "got 21", "steps=20"]),
    "floor that is no fraction": ("--floor 2", ["floor", "got 2"]),
    "no steps": ("--steps 0", ["--steps", "at least 1", "got 0"]),
    "empty batches": ("--micro-batch 0", ["--micro-batch", "at least 1", "got 0"]),
    "no accumulation": ("--accumulation 0", ["--accumulation", "at least 1", "got 0"]),
    "negative learning rate": ("--lr -1", ["--lr", "got -1"]),
    "learning rate that is no number": ("--lr nan", ["--lr", "got nan"]),
    "clip norm of nothing": ("--clip-norm 0", ["--clip-norm", "got 0"]),
    "unknown device": ("--device abacus", ["--device abacus"]),
    "resume from nowhere": ("--resume nowhere", ["--resume", "nowhere"]),
    "out that is a file": ("--out corpus.txt", ["--out corpus.txt"]),
    "out below a file": ("--out corpus.txt/run", ["--out corpus.txt/run"]),
}


@pytest.mark.run
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line_that_names_them(tmp_path, case):
    flags, named = WRONG[case]
    (corpus(tmp_path) / "empty.txt").touch()
    line = refused(here(tmp_path, f"baseline {TINY} --out run {flags}"), 2)
    assert all(text in line for text in named), line
    assert not (tmp_path / "run").exists(), "a run that never began leaves no folder"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--subset some", "--subset: got 'some', expected a whole number or one of heuristic, sqrt"),
        ("--update-proj-gap 0", "--update-proj-gap must be at least 1, got 0"),
        ("--rank 17", "model.layers.0.self_attn.q_proj.weight (16, 16): rank must lie in [1, 16]"),
    ],
)
def test_wrong_arguments_of_snsm_are_named(tmp_path, flags, named):
    assert named in refused(here(corpus(tmp_path), f"snsm demo {TINY} --out run {flags}"), 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here CUDA is no wrong argument")
def test_a_device_that_is_not_there_is_named(tmp_path):
    assert "--device cuda" in refused(here(corpus(tmp_path), f"baseline {TINY} --device cuda"), 2)


@pytest.mark.run
def test_a_process_ends_with_the_same_line_and_code(tmp_path):
    assert "nowhere.txt" in refused(finish(start(tmp_path, f"baseline {TINY} --data nowhere.txt")), 2)


@pytest.mark.parametrize("flags", ["--optimizer adamm", "--no-such-flag 1", "--steps many", "--size.heads 3"])
def test_what_no_flag_allows_is_refused_while_parsing(tmp_path, flags):
    done = here(tmp_path, f"baseline {flags}")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert flags.split()[0] in done.err


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    corpus(tmp_path)
    assert here(tmp_path, f"baseline {TINY} --steps 2 --out run").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    line = refused(here(tmp_path, f"baseline {TINY} --out run"), 2)
    assert "--out run" in line and "--resume auto" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.run
def test_without_out_each_run_gets_a_folder_of_its_own(tmp_path):
    corpus(tmp_path)
    for _ in range(2):
        assert here(tmp_path, f"baseline {TINY} --steps 2").code == 0
    found = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/result.json"))
    assert found == ["baseline-adamw-demo", "baseline-adamw-demo-2"]


@pytest.mark.compiles
@pytest.mark.run
@pytest.mark.parametrize(
    "recipe",
    few(
        ["baseline", "omgd pretrain --active 1 --period 5step --mask-warmup 4step", "rso demo --rank 4"],
        "rso demo --rank 4",
    ),
)
def test_a_run_says_what_memory_was_predicted_and_measured(tmp_path, recipe):
    done = here(
        corpus(tmp_path),
        f"{recipe} {TINY} --check-memory --micro-batch 64 --size.hidden-size 64 --sequence 32 --steps 9 --out run",
    )
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("memory "))
    predicted, measured = (float(word) for word in line.split() if word.replace(".", "").isdigit())
    assert measured > 0.01 and abs(predicted - measured) <= 0.05 * measured, line
