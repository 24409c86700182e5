"""A rule is one file and one line. Here a rule is added to a copy of the code, and every command finds it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.grids import few
from helpers.runs import ONE_THREAD, ROOT, TINY, corpus, newest

pytestmark = pytest.mark.run

RULE = '''"""Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.

    d <- sign(b1 m + (1 - b1) g)        m <- b2 m + (1 - b2) g        w <- w - lr (d + wd w)
"""

from dataclasses import dataclass

import torch

from ..contract import Family, Kind, Rule, declare
from ..moments import Moments


@dataclass(frozen=True)
class Lion:
    """Lion's settings."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the average that is stepped along, and of the one that is kept."""
    mane: int = 7
    """How many hairs the lion of this test has."""


def build(name, options):
    b1, b2 = options.betas

    def init(p):
        return {"pride": torch.zeros_like(p, dtype=torch.float32)}

    def update(g, slots, p, hyper):
        m, g = slots["pride"], g.float()
        delta = -hyper["lr"] * (m.lerp(g, 1 - b1).sign() + hyper["weight_decay"] * p.float())
        return delta, {"pride": m.lerp(g, 1 - b2)}

    def export(slots, p):
        return Moments(slots["pride"], None, (1 / (1 - b2), 0.0))

    def adopt(moments, slots, p, key):
        return {"pride": moments.first.clone()}, "kept"

    return Rule(name, options, declare(pride=Kind.FIRST), init, update, export=export, adopt=adopt)


lion = Family("lion", Lion, build)
'''

RECIPES = ("baseline", "snsm demo", "sumo demo", "omgd pretrain", "rso demo")
TRAINED = {  # a run of each recipe, and what its own flags are made for a tiny model
    "baseline": "baseline",
    "snsm": "snsm demo",
    "sumo": "sumo demo",
    "omgd": "omgd pretrain --active 1 --period 2step",
    "rso": "rso demo --rank 4 --period 4",
}
FEW = ("baseline", "rso")  # of the runs; with the others the test is slow
LION = "--optimizer lion --mane 9 --lr 1e-3"
STEPS = f"{TINY} --steps 6 --eval-every 6"
COMPARED = {  # the table of a comparison, and its methods
    "one": "'lion inside @ 1e-3 = rso demo --rank 4 --inner lion'",
    "two": "'lion @ 1e-3 = baseline --optimizer lion' 'lion inside @ 1e-3 = rso demo --rank 4 --inner lion'",
}


def training(*names: str) -> list[tuple[str, str]]:
    """The commands of these runs, and of the same from their third step on."""
    line = f"{STEPS} {LION}"
    return [
        *((name, f"recipes.{TRAINED[name]} {line} --save-every 3 --out {name}") for name in names),
        *(
            (f"{name}, resumed", f"recipes.{TRAINED[name]} {line} --resume {name}/step-00000003 --out {name}-again")
            for name in names
        ),
    ]


def comparing(name: str) -> tuple[str, str]:
    return f"compare {name}", f"recipes.compare {name} --methods {COMPARED[name]} -- {STEPS}"


LINES = [  # its name, and a command of the copied code as it is typed after python -m
    *((f"help {recipe}", f"recipes.{recipe} --optimizer lion --help") for recipe in RECIPES),
    *((f"list {recipe}", f"recipes.{recipe} --help") for recipe in RECIPES),
    *training(*FEW),
    ("plan", f"tools.plan baseline {STEPS} --optimizer lion --json"),
    ("plan of adamw", f"tools.plan baseline {STEPS} --optimizer adamw --rest-lr 1e-3 --json"),
    ("inspect", "tools.inspect baseline --json"),
    ("inspect fresh", "tools.inspect --fresh 'baseline --optimizer lion --mane 11' --json"),
    ("swap from", "tools.swap baseline from-lion --to 'snsm demo --rank 4'"),
    ("swap to", "tools.swap from-lion to-lion --to 'baseline --optimizer lion --mane 3'"),
    (
        "swap and train",
        f"recipes.baseline {STEPS} --steps 8 {LION} --resume from-lion --swap convert --out swapped",
    ),
    ("swap at", f"recipes.baseline {STEPS} --out at --swap-at 3 'rso demo --rank 4 --optimizer lion --lr 1e-3'"),
    comparing("one"),
    ("docs", "tests.rule_table"),
]
SLOW = [*training(*(name for name in TRAINED if name not in FEW)), comparing("two")]

DRIVER = """
import contextlib, io, json, runpy, shlex, sys, traceback
import torch
torch.set_num_threads(1)
done, file = {}, sys.argv[2]
for name, line in json.loads(sys.argv[1]):
    out, code = io.StringIO(), 0
    sys.argv = shlex.split(line)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        code = -1
        out.write(traceback.format_exc())
    done[name] = [code, out.getvalue()]
from pathlib import Path
Path(file).write_text(json.dumps(done))
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """The code with the rule added: one file, one line."""
    folder = tmp_path_factory.mktemp("code")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("optimizers", "engine", "models", "recipes", "tools", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "rule_table.py", folder / "tests")
    (folder / "optimizers" / "rules" / "lion.py").write_text(RULE)
    registry = folder / "optimizers" / "registry.py"
    text = registry.read_text()
    assert text.count('    "muon",\n') == 1
    registry.write_text(text.replace('    "muon",\n', '    "muon",\n    "lion",\n'))
    return folder


def driven(folder: Path, code: Path, lines: list[tuple[str, str]], file: str) -> Path:
    """The folder in which these commands ran, one after another in one process, and the file of what they said."""
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines), file],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(code), "COLUMNS": "300", **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return folder / file


@pytest.fixture(scope="module")
def run(code, tmp_path_factory) -> Path:
    """The folder in which the commands ran."""
    return driven(corpus(tmp_path_factory.mktemp("ran")), code, LINES, "done.json").parent


@pytest.fixture(scope="module")
def more(code, run) -> Path:
    """What the slow commands said, in the same folder."""
    return driven(run, code, SLOW, "more.json")


@pytest.fixture
def said(run, request) -> Callable[[str], str]:
    """What a command said, given that it succeeded."""
    done = json.loads((run / "done.json").read_text())

    def of(name: str) -> str:
        if name not in done:
            done.update(json.loads(request.getfixturevalue("more").read_text()))
        exit_code, text = done[name]
        assert exit_code == 0, f"{name}: {exit_code}\n{text[-3000:]}"
        assert "Traceback" not in text
        return text

    return of


def test_it_is_one_file_and_one_line(code, run):
    differ = []
    for path in sorted(code.rglob("*.py")):
        was = ROOT / path.relative_to(code)
        if not was.exists() or was.read_text() != path.read_text():
            differ.append(path.relative_to(code).as_posix())
    assert differ == ["optimizers/registry.py", "optimizers/rules/lion.py"]
    lines = [set((folder / "optimizers" / "registry.py").read_text().splitlines()) for folder in (ROOT, code)]
    assert lines[1] - lines[0] == {'    "lion",'} and lines[0] <= lines[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe_names_it_and_explains_its_options(recipe, said):
    assert re.search(r"--optimizer \{[^}]*\blion\b[^}]*\}", said(f"list {recipe}"))
    own = said(f"help {recipe}")
    assert "--mane INT" in own and "How many hairs the lion of this test has. (default: 7)" in own
    assert "--betas FLOAT FLOAT" in own and "0.9 0.99)" in own
    assert "--mane" not in said(f"list {recipe}")


@pytest.mark.parametrize("name", few(TRAINED, *FEW))
def test_every_recipe_trains_with_it_and_resumes_to_the_bit(name, run, said):
    assert "lion" in said(name), "the receipt says who trains what"
    assert "resuming" in said(f"{name}, resumed")
    again, saved = newest(run / f"{name}-again"), newest(run / name)
    assert again.header == saved.header and again.step == saved.step == 6
    assert again.params.keys() == saved.params.keys() and again.state.keys() == saved.state.keys()
    assert all(again.params[n].equal(p) for n, p in saved.params.items())
    assert all(again.state[n][slot].equal(t) for n, slots in saved.state.items() for slot, t in slots.items())
    assert saved.trainer["config"]["optimizer"] == "lion"
    assert saved.trainer["config"]["options"] == {"betas": [0.9, 0.99], "mane": 9}
    moved = [slots for slots in saved.state.values() if "pride" in slots]
    assert moved and any(slots["pride"].any() for slots in moved)


def test_its_memory_is_planned(said):
    lion, adamw = (json.loads(said(name))["asked"] for name in ("plan", "plan of adamw"))
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 24)
    assert adamw["state"] - lion["state"] >= 4 * matrices, "one moment instead of two, in float32"
    assert lion["state"] > 4 * matrices


@pytest.mark.parametrize(("name", "mane"), [("inspect", 9), ("inspect fresh", 11)])
def test_its_state_is_inspected(name, mane, said):
    found = json.loads(said(name))
    assert "lion" in found["rules"]
    one = next(p for p in found["parameters"] if p["rule"] == "lion")
    assert one["options"] == {"betas": [0.9, 0.99], "mane": mane}
    assert [(slot["name"], slot["kind"]) for slot in one["slots"]] == [("pride", "first moments")]


def test_runs_are_swapped_from_it_and_to_it(run, said):
    assert "lion -> snsm" in said("swap from") and "snsm -> lion" in said("swap to")
    for name in ("from-lion", "to-lion"):
        rows = json.loads((run / name / "swap.json").read_text())
        assert {"lion", "snsm"} & {row["source"] for row in rows}
        assert all(row["first_kept"] > 0.1 for row in rows if {row["source"], row["target"]} == {"lion", "snsm"})
    assert newest(run / "to-lion").trainer["config"]["options"]["mane"] == 3
    said("swap and train")
    said("swap at")
    for name, end in (("swapped", 8), ("at", 6)):
        saved = newest(run / name)
        assert saved.step == end and any("pride" in slots for slots in saved.state.values())


@pytest.mark.parametrize("name", few(COMPARED, "one"))
def test_it_is_compared_as_a_method(run, said, name):
    assert "lion inside" in said(f"compare {name}")
    table = (run / name / "table.md").read_text()
    assert re.search(r"^\| lion inside \| 0.001 \|", table, re.M)
    assert name == "one" or re.search(r"^\| lion \| 0.001 \|", table, re.M)


def test_the_table_of_the_docs_has_it(code, said):
    said("docs")
    (row,) = re.findall(r"^\| lion \|.*$", (code / "docs" / "choosing.md").read_text(), re.M)
    assert "Symbolic Discovery" in row and "`mane=7`" in row and "first moments: `pride`" in row
    assert row not in (ROOT / "docs" / "choosing.md").read_text()
