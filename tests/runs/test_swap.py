"""Another optimizer in the middle of a run: what it takes over, what it says of it, and that training goes on."""

import json
import shlex
from pathlib import Path

import pytest
from helpers.runs import TINY, Done, column, corpus, here, newest, tool

from engine import checkpoint
from recipes.registry import trained_by

TARGETS = {
    "snsm": "snsm demo --rank 4",
    "adam_sn": "snsm demo --method adam_sn",
    "sumo": "sumo demo --rank 4",
    "muon": "baseline --optimizer muon",
    "galore": "baseline --optimizer galore --rank 4",
    "rso": "rso demo --rank 4 --period 7",
    "rso in products, shared": "rso demo --rank 4 --period 7 --form products --share",
    "omgd": "omgd pretrain --active 1 --period 5step",
    "omgd by norms": "omgd pretrain --choose norms --active 1 --period 3step",
    "omgd over sumo, kept": "omgd pretrain --active 1 --period 5step --over sumo --rank 4 --state-policy keep",
    "adamw": "baseline",
}


def swap(folder: Path, line: list[str]) -> Done:
    return tool(folder, shlex.join(["tools.swap", *line]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every optimizer, twelve steps each."""
    folder = corpus(tmp_path_factory.mktemp("swap"))
    for i, target in enumerate(TARGETS.values()):
        done = here(folder, f"{target} {TINY} --steps 12 --eval-every 12 --out run{i}")
        assert done.code == 0, done.err
    return folder


FAST = {("snsm", "adamw"), ("rso in products, shared", "adamw"), ("omgd over sumo, kept", "adamw")}
FAST |= {("adamw", name) for name in ("sumo", "galore", "rso", "omgd by norms")}
PAIRS = [
    pytest.param(i, target, id=f"{source}-{name}", marks=() if (source, name) in FAST else pytest.mark.slow)
    for i, source in enumerate(TARGETS)
    for name, target in TARGETS.items()
]


@pytest.mark.run
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_optimizer_takes_over_from_every_other(trained, tmp_path, source, target):
    """Weights are those of the checkpoint, merged; training goes on, from the same batch and to the same step."""
    out = tmp_path / "out"
    run = f"{target} {TINY} --steps 16 --eval-every 16"
    done = here(trained, f"{run} --resume run{source} --swap only --out {out}")
    assert done.code == 0, done.err
    assert "optimizer state converted" in done.out
    rows = json.loads((out / "swap.json").read_text())
    assert {row["name"] for row in rows} <= set(newest(out).params)
    before, after = newest(trained / f"run{source}"), newest(out)
    assert before.step == after.step == 12 and before.trainer["position"] == after.trainer["position"]
    if before.header.get("rso.form") != "products":
        assert all(after.params[name].equal(p) for name, p in before.params.items())
    done = here(trained, f"{run} --resume auto --out {out}")
    assert done.code == 0, done.err
    assert newest(out).step == 16
    losses = dict(column(out, "train/loss"))
    assert max(losses.values()) < 1.1 * dict(column(trained / f"run{source}", "train/loss"))[12] + 0.1, losses


@pytest.mark.run
def test_the_rate_warms_up_again_also_where_that_is_interrupted(trained, tmp_path):
    """Twelve steps of AdamW, then SNSM with six steps of warm-up, killed after three of them or not."""
    run = f"snsm demo --rank 4 {TINY} --schedule constant --lr 1e-3 --rewarm 6 --log-every 1 --resume"
    for name, lines in (("straight", ["run9 --steps 20"]), ("stopped", ["run9 --steps 15", "auto --steps 20"])):
        for number, line in enumerate(lines):
            swap = "" if number else "--swap convert"
            done = here(trained, f"{run} {line} {swap} --eval-every 20 --warmup 0 --out {tmp_path / name}")
            assert done.code == 0, done.err
    rates = dict(column(tmp_path / "straight", "train/learning_rate/snsm"))
    assert [rates[step] * 6e3 for step in range(13, 21)] == pytest.approx([1, 2, 3, 4, 5, 6, 6, 6])
    assert rates == dict(column(tmp_path / "stopped", "train/learning_rate/snsm"))
    straight, stopped = newest(tmp_path / "straight"), newest(tmp_path / "stopped")
    assert straight.trainer["swapped"] == stopped.trainer["swapped"] == 12
    assert all(stopped.params[name].equal(p) for name, p in straight.params.items())


@pytest.mark.run
def test_products_are_merged_before_they_are_left(trained, tmp_path):
    """The next batch's loss is the same whether RSO goes on or AdamW does: B Pᵀ is in the weights."""
    source = list(TARGETS).index("rso in products, shared")
    runs = {"rso": TARGETS["rso in products, shared"], "adamw": f"{TARGETS['adamw']} --swap convert"}
    losses = {}
    for name, target in runs.items():
        resumed = f"{target} {TINY} --steps 14 --eval-every 14 --resume run{source} --out {tmp_path / name}"
        done = here(trained, resumed)
        assert done.code == 0, done.err
        losses[name] = dict(column(tmp_path / name, "train/loss"))[13]
    assert abs(losses["rso"] - losses["adamw"]) < 1e-5, losses


@pytest.mark.run
def test_where_and_how_a_run_was_compiled_does_not_matter_to_its_optimizer(trained):
    """A checkpoint may name a mode that there is no more."""
    saved = newest(trained / "run0")
    old = saved._replace(trainer=saved.trainer | {"config": saved.trainer["config"] | {"compile": "step"}})
    assert trained_by(old) == trained_by(saved)


@pytest.mark.run
def test_a_checkpoint_of_another_optimizer_is_refused_with_the_way_out(trained):
    done = here(trained, f"snsm demo --rank 4 {TINY} --resume run{list(TARGETS).index('adamw')} --out refused")
    assert done.code == 5 and "convert it with --swap" in done.err


@pytest.mark.run
def test_the_tool_writes_a_checkpoint_that_the_recipe_resumes(trained, tmp_path):
    out = str(tmp_path / "out")
    done = swap(trained, [f"run{list(TARGETS).index('adamw')}", out, "--to", "snsm demo --rank 4"])
    assert done.code == 0, done.err
    assert "projected, second moment summed into subsets" in done.out
    assert checkpoint.latest(Path(out)).path is not None
    assert here(trained, f"snsm demo --rank 4 {TINY} --steps 14 --eval-every 14 --resume auto --out {out}").code == 0
    again = swap(trained, ["run0", out, "--to", "snsm demo --rank 4"])
    assert again.code == 2 and "holds a run already" in again.err


@pytest.mark.run
@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (["run0", "new", "--to", "no_such"], 2, "'no_such', expected a recipe and its flags"),
        (["run0", "new", "--to", "../x"], 2, "expected a recipe and its flags"),
        (["missing", "new", "--to", "baseline"], 2, "SOURCE: got 'missing', which is not there"),
        (["damaged", "new", "--to", "baseline"], 5, "damaged: none of its 1 checkpoints is whole"),
        (["run0", "new", "--to", "sumo demo --rank 400"], 2, "rank must lie in"),
    ],
)
def test_what_cannot_be_swapped_says_why(trained, line, code, message):
    (trained / "damaged" / "step-00000001").mkdir(parents=True, exist_ok=True)
    done = swap(trained, line)
    assert done.code == code and message in done.err, done
    assert not (trained / "new").exists()


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--swap convert", "--swap-at 20 baseline", "--swap-at 0 baseline"])
def test_a_swap_that_would_not_happen_is_an_error(trained, flags):
    done = here(trained, f"baseline {TINY} {flags} --out none")
    assert done.code == 2 and "--swap" in done.err


@pytest.mark.run
def test_a_run_goes_on_under_another_optimizer(trained):
    """--swap-at: one folder, one curve, two optimizers."""
    line = f'baseline {TINY} --eval-every 10 --out swapped --swap-at 8 "sumo demo --rank 4 --lr 1e-3"'
    done = here(trained, line)
    assert done.code == 0, done.err
    assert "resuming swapped/step-00000008 at step 8" in done.out
    assert [step for step, _ in column(trained / "swapped", "train/loss")] == list(range(1, 21))
    last = newest(trained / "swapped")
    assert last.step == 20 and any("momentum_buffer" in slots for slots in last.state.values())
