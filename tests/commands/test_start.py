"""What a recipe loads before it does anything, and that a finished run stays finished whatever its end brings."""

import subprocess
import sys

import pytest
from helpers.grids import few
from helpers.runs import ROOT, TINY, corpus, here

from engine.terminal.attempt import attempt
from recipes import train

PRIVATE = ("torch._inductor", "torch._functorch.aot_autograd", "torch._dynamo", "torch._subclasses.fake_tensor")
SLOW = ("tensorboard", "matplotlib", "transformers", "typeguard")

RECIPES = ("baseline", "snsm", "sumo", "omgd", "rso", "finetune", "demo", "compare")
LOOK = """
import importlib, sys, torch
before = set(sys.modules)
for recipe in sys.argv[1:]:
    importlib.import_module(f"recipes.{recipe}")
    print(recipe, *sorted(set(sys.modules) - before))
"""

# Names that the planner takes from torch's private modules go away, as in another version of torch. What torch's own
# modules import is theirs.
BROKEN = """
import builtins, runpy, sys
real = builtins.__import__
GONE = {"torch._dynamo.backends.common", "torch._functorch.aot_autograd", "torch._inductor.compile_fx",
        "torch._inductor.decomposition", "torch._subclasses.fake_tensor"}
def broken(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {}).get("__name__", "")
    if name in GONE and not asking.startswith(("torch", "sympy")):
        raise ImportError(f"{name} was renamed, says {asking}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = broken
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def python(code: str, *arguments: str, folder=ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-c", code, *arguments]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.run
def test_a_recipe_loads_nothing_slow_or_private():
    """One after another in one process: what the first recipe with a slow module loads is seen beside its name."""
    done = python(LOOK, *RECIPES)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [recipe for recipe, *_ in lines] == list(RECIPES)
    for recipe, *loaded in lines:
        slow = [name for name in loaded if name.startswith((*PRIVATE, *SLOW, "engine.planner.plan"))]
        assert slow == [], recipe


@pytest.mark.run
def test_a_run_starts_and_ends_where_the_private_modules_are_broken(tmp_path):
    flags = f"{TINY} --check-memory --steps 3 --out run".split()
    done = python(BROKEN, "recipes.baseline", *flags, folder=corpus(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("memory "))
    assert "not predicted: ImportError: " in line and "was renamed" in line
    assert "a sample" in done.stdout and (tmp_path / "run" / "result.json").exists()
    assert "CPUAllocator" not in done.stderr, "counting the last step's memory brings no warning of torch"


ENDS = {
    "memory": ("planned", "not predicted"),
    "loss curve": ("evaluations", "not drawn"),
    "numbers": ("write_result", "not written"),
    "sample": ("generate", "not drawn"),
}


@pytest.mark.run
@pytest.mark.parametrize("name", few(ENDS, "memory", "numbers"))
def test_what_fails_after_the_last_checkpoint_is_a_line(tmp_path, monkeypatch, name):
    function, said = ENDS[name]

    def fail(*arguments, **options):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(train, function, fail)
    done = here(corpus(tmp_path), f"baseline {TINY} --check-memory --steps 3 --out run", ends=True)
    assert done.code == 0, done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith(name) and "not " in line)
    assert line == f"{name:12} {said}: RuntimeError: no room"
    assert "checkpoint   run/step-00000003" in done.out


def test_an_interrupt_is_no_failure_of_an_end():
    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupt, "drawn")
