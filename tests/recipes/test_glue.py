"""Encoders on labelled texts: every recipe that fine-tunes one, from a folder and GLUE's files to a checkpoint."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.glue import folder, model
from helpers.grids import covering, few
from helpers.runs import assert_identical, cell_here, column, here, interrupted, killed, newest, refused, tool

from models import encoder_weights
from optimizers.contract import UsageError
from recipes.build import build
from recipes.glue import TASKS
from recipes.registry import config_class, from_plain, parsed

SMALL = "--compile off --no-check-memory --sequence 20 --micro-batch 4 --log-every 1 --init model --data glue "
RECIPES = ("baseline glue", "omgd glue --active 1", "sumo glue", "rso glue --period 3")
each = pytest.mark.parametrize("recipe", few(RECIPES, RECIPES[1], RECIPES[3]))


def asked(line: str) -> Any:
    return parsed(line.split(), "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("glue"))


@pytest.mark.run
@each
def test_a_recipe_trains_and_is_judged_on_the_whole_set(made: Path, recipe: str) -> None:
    out = f"run-{recipe.partition(' ')[0]}"
    done = here(made, f"{recipe} --task rte {SMALL} --epochs 4 --lr 3e-3 --out {out}")
    assert done.code == 0, done
    assert [step for step, _ in column(made / out, "eval/accuracy")] == [10, 20, 30, 40]
    right = [round(value * 11, 6) for _, value in column(made / out, "eval/accuracy")]
    assert right == [int(value) for value in right], "of 11 rows, each counted once"
    assert "drawn anew, as model does not have them: bert.pooler.dense.weight" in done.out
    assert "accuracy 0." in done.out and "tools.generate" not in done.out
    assert (made / out / "tokenizer/tokenizer.json").is_file()
    saved = newest(made / out)
    assert saved.model_config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    again = from_plain(config_class(saved.trainer["config"]["recipe"]), saved.trainer["config"])
    assert (again.task, again.labels, again.steps) == ("rte", ("entailment", "not_entailment"), 40)


@pytest.mark.run
@pytest.mark.parametrize(
    ("task", "metrics"), [("cola", ["matthews", "accuracy"]), ("stsb", ["pearson", "spearman"])], ids=["cola", "stsb"]
)
def test_tasks_have_their_own_metrics(made: Path, task: str, metrics: list[str]) -> None:
    pytest.importorskip("sklearn", reason="needs the extra `tasks`")
    pytest.importorskip("scipy", reason="needs the extra `tasks`")
    done = here(made, f"baseline glue --task {task} {SMALL} --steps 4 --eval-every 2 --out run-{task}")
    assert done.code == 0, done
    for name in metrics:
        assert [step for step, _ in column(made / f"run-{task}", f"eval/{name}")] == [2, 4]


@pytest.mark.run
@pytest.mark.parametrize(
    ("end", "recipe"),
    [("interrupted", RECIPES[1]), *(pytest.param("killed", recipe, marks=pytest.mark.slow) for recipe in RECIPES)],
)
def test_a_run_that_was_cut_off_ends_as_one_that_was_left_alone(tmp_path: Path, end: str, recipe: str) -> None:
    """Dropout, masks, subspaces and the order of the data go on where they were, after Ctrl-C and after kill -9."""
    folder(tmp_path)
    line = f"{recipe} --task rte {SMALL} --eval-every 50 --save-every 2 --schedule constant --warmup 0 "
    if end == "killed":
        killed(tmp_path, f"{line} --out parts --steps 4000", "parts/step-00000004")
    else:
        interrupted(tmp_path, f"{line} --out parts --steps 4000", 4)
    last = max(int(path.name[5:]) for path in (tmp_path / "parts").glob("step-*")) + 5
    for flags in ("--out parts --resume auto", "--out whole"):
        done = here(tmp_path, f"{line} {flags} --steps {last}")
        assert done.code == 0, done
    assert_identical(tmp_path / "parts", tmp_path / "whole", unit="examples")


def test_a_task_of_ones_own_takes_its_labels_from_its_file(tmp_path: Path) -> None:
    model(tmp_path / "model", "roberta")
    for name in ("mine", "held"):
        rows = "".join(
            f'{{"said": "the cat {w}", "kind": "{k}"}}\n' for w, k in (("runs", "b"), ("sees", "a"), ("eats", "c"))
        )
        (tmp_path / f"{name}.jsonl").write_text(rows)
    line = "baseline glue --task custom --text-fields said --label-field kind " + SMALL.replace("glue", "mine.jsonl")
    done = here(tmp_path, f"{line} --validation held.jsonl --steps 2 --out run")
    assert done.code == 0, done
    assert newest(tmp_path / "run").model_config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert "--validation: got none" in refused(here(tmp_path, f"{line} --steps 2 --out other"), 2)


REFUSED = {
    "": ["--init", "got none", "BERT or RoBERTa"],
    "--init glue": ["--init", "config.json", "is not there"],
    "--init model --data nowhere": ["--data", "nowhere"],
    "--init model --data glue --label-field gold": ["RTE/train.tsv", "expected one named 'gold'", "--label-field"],
    "--init model --data glue --text-fields premise": ["expected one named 'premise'", "--text-fields"],
    "--init model --data glue --labels yes entailment": ["got 'not_entailment'", "expected one of yes, entailment"],
    "--init model --data glue --labels one": ["--labels", "two or more"],
    "--init model --data glue --task mnli": ["glue", "no training split", "train.tsv"],
    "--init model --data glue --metrics pearson": ["--metrics", "'pearson'", "accuracy, f1, matthews"],
    "--init model --data glue --sequence 65": ["--sequence", "got 65", "at most 64"],
    "--init model --data glue --sequence 3": ["--sequence", "got 3", "special tokens"],
    "--init model --data glue --epochs 1 --steps 3": ["--epochs and --steps"],
    "--init model --data glue --epochs 0": ["--epochs: got 0", "--steps"],
    "--init model --data glue --eval-epochs=0.0": ["--eval-epochs: got 0", "--eval-every"],
    "--init model --data glue --task wnli --preset paper": ["--preset paper", "no task wnli"],
    "--init model --data glue --task custom": ["--text-fields", "custom"],
    "--init three --data glue": ["classifier.weight", "[3, 32]", "[2, 32]"],
    "--init small --data glue": ["encoder.layer.2", "config.json"],
}


@pytest.mark.run
@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_one_line(made: Path, flags: str) -> None:
    for name, changed in (("three", {"num_hidden_layers": 3}), ("small", {"num_hidden_layers": 2})):
        if not (made / name).is_dir():
            whole = model(made / name)
            head: Any = ("classification", ("a", "b", "c")) if name == "three" else ("masked", ())
            encoder_weights.save(made / name, encoder_weights.load(made / name, *head), **changed)
            assert whole.num_hidden_layers == 3
    sequence = "" if "--sequence" in flags else "--sequence 20"
    line = refused(here(made, f"baseline glue {flags} {sequence} --compile off --out refused"), 2)
    assert all(word in line for word in REFUSED[flags]), line
    assert not list((made / "refused").glob("step-*"))


def test_a_head_of_other_classes_may_be_drawn_anew(made: Path) -> None:
    if not (made / "two").is_dir():
        model(made / "two")
        encoder_weights.save(made / "two", encoder_weights.load(made / "two", "classification", ("a", "b", "c")))
    config = asked(f"baseline glue --init {made / 'two'} --data {made / 'glue'} --new-head --sequence 20")
    run = build(config, 0)
    params = run.place("cpu")
    assert params["classifier.weight"].shape == (2, 32) and float(params["classifier.weight"].detach().std()) < 0.1
    assert any("drawn anew" in note and "classifier.weight" in note for note in run.notes)


def test_papers_settings(made: Path) -> None:
    """Of RoBERTa-base: OMGD's Table 7 and its code, SUMO's Table 10."""
    common = f"--init {made / 'model'} --data {made / 'glue'} --preset paper --sequence 20"
    shared = dict(epochs=30.0, schedule="linear", floor=0.0, warmup=0, weight_decay=0.0)
    expected = {
        "omgd glue --task cola": dict(lr=2.5e-5, micro_batch=32, active=4, period="2epoch", seed=42),
        "omgd glue --task qqp": dict(lr=1e-5, micro_batch=64),
        "omgd glue --task mrpc": dict(lr=3.5e-5, micro_batch=16),
        "baseline glue --task rte": dict(lr=1e-5, micro_batch=32, optimizer="adamw"),
        "sumo glue --task cola": dict(lr=3e-5, micro_batch=32, rest_lr=1e-5, optimizer="sumo_paper"),
        "sumo glue --task stsb": dict(lr=1e-5, micro_batch=16),
        "rso glue --task rte": dict(lr=1e-5, micro_batch=16, rank=4, period=500),
    }
    for line, fields in expected.items():
        if "cola" in line or "mrpc" in line or "qqp" in line or "stsb" in line:
            pytest.importorskip("sklearn", reason="needs the extra `tasks`")
        found = asked(f"{line} {common}")
        assert {name: getattr(found, name) for name in {**shared, **fields}} == pytest.approx({**shared, **fields}), (
            line
        )
    options = asked(f"sumo glue --task rte {common}").options
    assert (options.rank, options.update_proj_gap, options.alpha) == (4, 500, 4.0)
    assert asked(f"omgd glue --task rte {common} --lr 3e-3 --epochs 2").lr == 3e-3
    assert asked(f"omgd glue --task rte {common} --steps 7").settled(5).steps == 7
    with pytest.raises(UsageError, match="expected one of cola, stsb, mrpc"):
        asked(f"omgd glue --task wnli {common}")
    assert set(TASKS) <= {"cola", "stsb", "mrpc", "rte", "sst2", "mnli", "qnli", "qqp"}


@pytest.mark.run
@pytest.mark.parametrize(("recipe", "name"), covering(RECIPES, ["adamw", "muon", "galore", "snsm", "sumo", "sgd"]))
def test_any_rule_can_stand_in(made: Path, recipe: str, name: str) -> None:
    config = asked(f"{recipe} --init {made / 'model'} --data {made / 'glue'} --optimizer {name} --sequence 20")
    run = build(config, 0, 10)
    assert set(run.optimizer.owner) == set(run.params)
    moved = {group.name for group in run.optimizer.owner.values()}
    assert len(moved) > 1
    state = run.optimizer.init(run.params)
    assert all(t.is_meta for slots in state.values() for t in slots.values())


def test_masks_choose_among_the_layers_of_the_encoder(made: Path) -> None:
    """Embeddings, pooler and head always train."""
    run = build(asked(f"omgd glue --active 1 --init {made / 'model'} --data {made / 'glue'} --sequence 20"), 0, 10)
    params = run.place("cpu")
    trainable, frozen = run.optimizer.split(params, run.optimizer.init(params))
    assert {name.split(".")[3] for name in frozen} | {
        name.split(".")[3] for name in trainable if ".layer." in name
    } == set("012")
    assert len({name.split(".")[3] for name in frozen}) == 2
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"} <= set(trainable)


@pytest.mark.slow
@pytest.mark.compiles
def test_a_plan_counts_a_compiled_step_with_dropout(made: Path) -> None:
    done = tool(made, "tools.plan omgd glue --active 1 --init model --data glue --sequence 20 --micro-batch 4")
    assert done.code == 0, done
    assert "activations" in done.out and "optimizer state" in done.out


@pytest.mark.run
def test_metrics_are_compared(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", cell_here(made))
    methods = '"AdamW @ 1e-3,1e-2 = baseline glue" "LISA @ 1e-2 = baseline glue --optimizer lisa --active 1"'
    run = f"{SMALL} --task rte --steps 4 --eval-every 2".replace("model", str(made / "model")).replace(
        "--data glue", f"--data {made / 'glue'}"
    )
    done = here(made, f"compare table --metric eval/accuracy --best highest --methods {methods} -- {run}")
    assert done.code == 0, done
    assert "| LISA | 0.01 |" in (made / "table/table.md").read_text()
