"""What pip installs is one package, `leanstep`, which lives beside anybody's own `engine`, `models` and `tools`."""

import ast
import os
import re
import shlex
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from helpers.runs import ONE_THREAD, ROOT, TINY, Done, corpus, tool

import one_package
from one_package import NAME, ROOMS, inside


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    one_package.gather(folder)
    return folder


@pytest.mark.run
def test_every_module_lies_in_the_one_package_and_names_no_other(gathered):
    for file in sorted(file for room in ROOMS for file in (gathered / NAME / room).rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        for node in ast.walk(tree):
            where = f"{file.relative_to(gathered)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").partition(".")[0] not in ROOMS, where
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & set(ROOMS), where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"python -m (recipes|tools)\.", node.value), where
                line = source.splitlines()[node.lineno - 1]
                if re.search('import_module|run_module|"-m"', line) and re.match(rf"({'|'.join(ROOMS)})\.", node.value):
                    assert re.search(r"\b(module|another)\(", line), f"{where} names a module of a clone as it runs"
    packages = {path.parent.relative_to(gathered / NAME) for path in (gathered / NAME).rglob("__init__.py")}
    assert packages == {
        path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")
    } | {Path()}


def test_only_imports_and_docstrings_are_written_anew():
    flat = '''"""Ü: python -m recipes.sumo demo; from engine.fit import fit; the engine.fit of models."""
import engine.fit as é, torch, tools.plot as plot; from models import llama
from . import step
def f():
    """python -m tools.plan"""
    from  recipes.build import build
    return "engine.fit", "python -m recipes.sumo", engine
'''
    assert (
        inside(flat.encode(), "x.py").decode()
        == '''"""Ü: leanstep sumo demo; from leanstep.engine.fit import fit; the engine.fit of models."""
import leanstep.engine.fit as é, torch, leanstep.tools.plot as plot; from leanstep.models import llama
from . import step
def f():
    """leanstep plan"""
    from  leanstep.recipes.build import build
    return "engine.fit", "python -m recipes.sumo", engine
'''
    )
    with pytest.raises(SyntaxError, match=r"x.py:2: write `from engine.fit import"):
        inside(b"\nimport engine.fit\n", "x.py")


def listed(said):
    return re.findall(r"^  (\w+) ", said, re.MULTILINE)


@pytest.mark.run
def test_the_command_lists_every_recipe_and_tool(tmp_path):
    guarded = [file for room in ROOMS for file in (ROOT / room).rglob("*.py") if "\nif __name__" in file.read_text()]
    named = [file.parent.name if file.stem == "__main__" else file.stem for file in guarded]
    assert len(set(named)) == len(named) > 15 and {"sumo", "finetune", "plan", "inspect", "bench"} <= {*named}
    for line in ("leanstep", "leanstep --help"):
        done = tool(tmp_path, line)
        assert done.code == 0 and sorted(listed(done.out)) == sorted(named)
    done = tool(tmp_path, "leanstep sumu")
    assert (done.code, done.out) == (2, "") and "got 'sumu', expected a command; perhaps sumo" in done.err
    assert tool(tmp_path, "leanstep plan --help").out.startswith("usage: python -m leanstep plan RECIPE")
    assert "see python -m leanstep plan snsm" in tool(tmp_path, "leanstep plan snsm --rnk 3").err
    wrong = tool(tmp_path, "leanstep inspect --fresh 'snsm demo --rnk 3'")
    assert wrong.code == 2 and "see python -m leanstep snsm" in wrong.err


def test_the_short_name_of_a_rule():
    import optimizers
    from optimizers import SUMO, Masks, torch_optim

    assert SUMO is torch_optim.SUMO and Masks.__module__ == "optimizers.wrappers.masks"
    for absent in ("NoSuchRule", "no_such_file"):
        with pytest.raises(AttributeError, match=absent):
            getattr(optimizers, absent)


class Clean:
    """An environment that has what this one has, but of leanstep only the wheel; in its folder lie packages of somebody
    else with the names of our rooms."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-c", WHEEL, folder / "wheel"], cwd=folder, check=True, capture_output=True)
        (wheel,) = (folder / "wheel").glob("*.whl")
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.bin, self.work = folder / "venv" / "bin", corpus(folder / "work")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.bin / "python",
            "install",
            "--no-deps",
            "--no-index",
            wheel,
        ]
        subprocess.run(pip, check=True, capture_output=True)
        (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
        others = [place for place in site.getsitepackages() if Path(place).is_dir()]
        (own / "others.pth").write_text("\n".join(others))  # as plain paths: editable installs in them are not followed
        for name in (*ROOMS, "tests"):
            (self.work / name).mkdir()
            (self.work / name / "__init__.py").write_text("raise ImportError('that of somebody else')")

    def __call__(self, *words: object) -> Done:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment = {**inherited, **ONE_THREAD, "PYTHONPATH": str(self.work), "TERM": "dumb"}
        line = [str(self.bin / str(words[0])), *map(str, words[1:])]
        done = subprocess.run(line, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)


WHEEL = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import one_package
os.makedirs(sys.argv[1])
one_package.build_wheel(sys.argv[1])
"""
USE = """
import importlib, pathlib, pkgutil, sys, torch, leanstep
from leanstep.optimizers import SUMO, AdamW, Masks

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
opt = SUMO(model.named_parameters(), lr=0.1, rank=2)
before = model[0].weight.clone()
model(torch.randn(4, 8)).square().sum().backward()
opt.step()
assert not torch.equal(before, model[0].weight)
for found in pkgutil.walk_packages(leanstep.__path__, "leanstep."):
    if not found.name.endswith(("__main__", ".beside")):
        importlib.import_module(found.name)
folder = pathlib.Path(leanstep.__file__).parent
assert folder.parent.name == "site-packages" and (folder / "py.typed").exists(), folder
print(sorted({name.partition(".")[0] for name in sys.modules} & {*sys.argv[1:]}))
"""


@pytest.mark.slow
@pytest.mark.run
def test_a_wheel_works_beside_packages_of_the_same_names(tmp_path):
    clean = Clean(tmp_path)
    used = clean("python", "-c", USE, *ROOMS)
    assert (used.code, used.out) == (0, "[]\n"), used.err

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert clean("leanstep", "--version").out == f"{version}\n"
    assert listed(clean("leanstep").out) == listed(tool(tmp_path, "leanstep").out)
    shown = clean("leanstep", "sumo", "--help").out
    assert shown.startswith("usage: leanstep sumo ") and "\n    leanstep sumo 60m --data" in shown.replace("│ ", "")
    assert not re.search(r"python -m|recipes\.|tools\.", shown), shown

    run = shlex.split(TINY.replace("--steps 20", "--steps 4"))
    method = "adamw @ 1e-3 = baseline"
    compared = clean("leanstep", "compare", "out", "--methods", method, "--seeds", "0", "--", *run)
    assert compared.code == 0, (compared.out, compared.err)
    (out,) = (clean.work / "out" / "runs").iterdir()
    more = ["--lr", "0.001", "--seed", "0", "--out", out.relative_to(clean.work), "--resume", "auto", "--steps", "6"]
    resumed = clean("python", "-m", "leanstep.recipes.baseline", *run, *more)
    assert resumed.code == 0, (resumed.out, resumed.err)
    assert "-m leanstep.tools.generate " in resumed.out
