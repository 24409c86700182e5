"""`fit` trains somebody's own module, loss and data: metrics, checkpoints, exact resume, in any thread."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.classifier import classifier, loss, metrics, run, table, task
from torch import nn

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.config import RunConfig
from engine.fit import fit
from engine.loop.metrics import read
from engine.tasks.arrays import ArrayTask
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

ROOT = Path(__file__).resolve().parents[2]


def test_a_classifier_reports_its_accuracy_and_knows_no_tokens(tmp_path, capsys):
    done = run(tmp_path / "run", eval_every=40)
    out = capsys.readouterr().out
    assert done.steps == 120 and done.metrics.keys() == {"loss", "accuracy"}
    assert done.metrics["accuracy"] > 0.93, done.metrics
    records = read(tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    keys = {key for record in [*records, result] for key in record}
    assert {"eval/loss", "eval/accuracy", "train/loss", "train/examples_per_second", "examples"} <= keys
    assert not [key for key in keys if "token" in key or "perplexity" in key]
    assert "token" not in out and "perplexity" not in out and "nats" not in out
    assert "accuracy 0.9" in out and "examples/s" in out
    assert result["examples"] == 120 * 32 and result["eval/accuracy"] == done.metrics["accuracy"]
    assert [r["step"] for r in records if "eval/accuracy" in r] == [40, 80, 120]
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert not config.keys() & {"sequence", "tokenizer", "data", "validation", "eval_windows", "eos", "field"}


def test_the_reported_metrics_are_those_of_the_module_in_eval_mode(tmp_path):
    """Of the model that was passed, trained in place; on every held-out row, though the last batch is short."""
    model, (_, held_out) = classifier(), table()
    optimizer = partition(dict(model.named_parameters()), [Group("adamw", adamw(), ("",), lr=3e-3)])
    settings = RunConfig(out=tmp_path / "run", steps=30, micro_batch=25, compile="off")
    done = fit(task(model), optimizer, settings)
    assert len(held_out["y"]) % 25, "the last batch is smaller"
    model.eval()
    with torch.no_grad():
        total, count = loss(model, held_out)
        correct, _ = metrics(model, held_out)["accuracy"]
    assert done.metrics["loss"] == pytest.approx(float(total) / count, rel=1e-5)
    assert done.metrics["accuracy"] == pytest.approx(int(correct) / count)


def test_evaluating_changes_nothing(tmp_path):
    """A run that evaluates at every step ends with the weights of one that does at the end only."""
    often, once = (run(tmp_path / str(n), plain=True, steps=20, eval_every=n) for n in (1, 20))
    assert_equal(often.out, once.out, records=False)
    model = classifier()
    model[1].eval()
    chosen = task(model)
    for batch in chosen.evaluation(64):
        chosen.evaluate(None, {}, batch)
    assert [m.training for m in model] == [True, False, True, True, True], "each module in the mode in which it was"


def test_every_row_is_trained_on_once_a_pass_in_an_order_of_the_seed():
    numbers = {"row": torch.arange(37)}
    tasks = [ArrayTask(nn.Linear(1, 1), loss, train=numbers, validation=numbers, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (
        torch.cat([t.batch(position, 5)["row"] for position in range(0, 37 * 5, 5)]).tolist() for t in tasks
    )
    assert first == again != other
    passes = [first[n * 37 : (n + 1) * 37] for n in range(5)]
    assert all(sorted(rows) == list(range(37)) for rows in passes) and passes[0] != passes[1]
    assert tasks[0].batch(18, 7)["row"].tolist() == first[18:25], "whatever the size of a batch"


def newest(out: Path) -> checkpoint.Checkpoint:
    path = checkpoint.latest(out).path
    assert path is not None
    return checkpoint.load(path)


def assert_equal(got: Path, expected: Path, records: bool = True) -> None:
    """Everything that the newest checkpoints of two runs hold, and what they recorded, to the bit."""
    a, b = newest(got), newest(expected)
    assert a.step == b.step and a.trainer["position"] == b.trainer["position"]
    assert list(a.params) == list(b.params) and list(a.state) == list(b.state)
    for name, p in b.params.items():
        assert a.params[name].equal(p), name
    for name, slots in b.state.items():
        assert all(a.state[name][slot].equal(t) for slot, t in slots.items()), name
    for key in ("train/loss", "eval/loss", "eval/accuracy") if records else ():
        first, second = ([(r["step"], r[key]) for r in read(out) if key in r] for out in (got, expected))
        assert first == second, key


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("BatchNorm and dropout", (50,)),
        *(pytest.param(kind, (50, 120), marks=pytest.mark.slow) for kind in ("BatchNorm and dropout", "plain")),
    ],
    ids=str,
)
def test_killed_and_resumed_to_the_bit(tmp_path, kind, kills):
    """Killed behind one of these steps or two, wherever it is."""

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "helpers.classifier", str(tmp_path / "killed"), kind]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, cwd=ROOT)

    for at in kills:
        process = start()
        end = time.monotonic() + 120
        while not any(int(path.name[5:]) >= at for path in (tmp_path / "killed").glob("step-*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert newest(tmp_path / "killed").step < 200
    process = start()
    assert process.wait(120) == 0
    torch.set_num_threads(1)
    run(tmp_path / "straight", plain=kind == "plain", steps=200, save_every=10, keep_last=3)
    assert_equal(tmp_path / "killed", tmp_path / "straight")


def test_fit_works_in_any_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "thread", plain=True, steps=10)))
    thread.start()
    thread.join()
    assert found and found[0].steps == 10
    run(tmp_path / "main", plain=True, steps=10)
    assert_equal(tmp_path / "thread", tmp_path / "main")


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 1}, "--seed 0, got 1"), ({"rows": 400}, "--data "), ({"y": 1}, "--data ")]
)
def test_other_data_or_another_order_is_refused(tmp_path, changed, named):
    run(tmp_path / "run", plain=True, steps=5)
    model, (train, held_out) = classifier(plain=True), table()
    train = {name: values[: changed.get("rows", len(values))].clone() for name, values in train.items()}
    train["y"][0] ^= changed.get("y", 0)
    other = ArrayTask(model, loss, train=train, validation=held_out, metrics=metrics, seed=changed.get("seed", 0))
    optimizer = partition(dict(model.named_parameters()), [Group("adamw", adamw(), ("",), lr=3e-3)])
    again = RunConfig(out=tmp_path / "run", steps=10, micro_batch=32, compile="off", resume="auto")
    with pytest.raises(CheckpointError, match=f"{named}.*--reorder"):
        fit(other, optimizer, again)


def test_what_cannot_be_trained_is_named(tmp_path):
    model, (train, held_out) = classifier(), table()

    def made(**given):
        return ArrayTask(model, loss, **{"train": train, "validation": held_out, **given})

    with pytest.raises(UsageError, match=r"train: got .*'x': 455.*'y': 9.* rows, expected equally many"):
        made(train={**train, "y": train["y"][:9]})
    with pytest.raises(UsageError, match=r"validation: got fields \['x'\], expected those of train, \['x', 'y'\]"):
        made(validation={"x": held_out["x"]})
    with pytest.raises(UsageError, match="train: got fields of shapes {}, expected at least one field"):
        made(train={})
    with pytest.raises(UsageError, match=r"train: got fields of shapes \{'x': \(0, 30\)\}"):
        made(train={"x": train["x"][:0]})
    wrong = partition({"other": torch.zeros(2)}, [Group("adamw", adamw(), ("",), lr=3e-3)])
    with pytest.raises(UsageError, match=r"optimizer: owns 1 parameters, expected the 6 of the model"):
        fit(made(), wrong, RunConfig(out=tmp_path / "run", compile="off"))
    optimizer = partition(dict(model.named_parameters()), [Group("adamw", adamw(), ("",), lr=3e-3)])
    scored = made(metrics=lambda module, batch: {"accuracy": 0.5})
    with pytest.raises(UsageError, match=r"accuracy: got 0.5, expected a pair of numbers \(sum, count\)"):
        fit(scored, optimizer, RunConfig(out=tmp_path / "run", compile="off", steps=1))
    assert not (tmp_path / "other").exists()
