"""Every path that a user names, of every kind that does not work: one line that names it, before the work is done."""

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.grids import covering
from helpers.runs import ROOT, TINY, Done, corpus, here
from helpers.runs import tool as run_tool

from engine.curves import loss_curve
from engine.terminal.paths import writable
from optimizers.contract import UsageError
from tools import generate, inspect, plot, prepare
from tools.bench import __main__ as bench

LONG = "x" * 300
FOLDERS = {  # names for a folder that is to be written
    "a file": "file",
    "below a file": "file/below",
    "a dangling link": "dangling",
    "below a dangling link": "dangling/below",
    "too long": LONG,
    "not for files": "/proc/here",
}
FILES = {  # names for a file that is to be written
    "a folder": "folder",
    "below a file": "file/below.png",
    "in a missing folder": "missing/a.png",
    "a dangling link": "dangling",
    "too long": f"{LONG}.png",
    "not for files": "/proc/a.png",
    "on a full disk": "/dev/full",
}
INPUTS = {  # names for what is to be read
    "missing": "missing",
    "below a file": "file/below",
    "a dangling link": "dangling",
    "too long": LONG,
    "an empty file": "empty.json",
    "an empty folder": "folder",
    "a foreign file": "file",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = corpus(tmp_path_factory.mktemp("paths"))
    assert here(folder, f"baseline {TINY} --steps 2 --out run").code == 0
    (folder / "file").write_bytes(b"\xff\xfe\x00nothing of ours")
    (folder / "empty.json").touch()
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to(folder / "nowhere" / "x")
    return folder


def tool(folder, main, line):
    """A tool's main in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(shlex.split(line))
    return Done(code, out.getvalue(), err.getvalue())


def said(done, name, codes=(2, 5)):
    """One line that names the path, and no work done."""
    assert done.code in codes, done
    lines = [line for line in done.err.splitlines() if not line.startswith("skipped")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and name[:200] in lines[0], done
    assert "training tokens" not in done.out, "found out after the data had been prepared"


@pytest.mark.run
@pytest.mark.parametrize(("kind", "recipe"), covering(FOLDERS, [f"baseline {TINY}", "omgd toy", "rso toy", "demo"]))
def test_out_of_every_recipe(made, recipe, kind):
    before = sorted(p.name for p in made.iterdir())
    said(here(made, f"{recipe} --out {FOLDERS[kind]}"), FOLDERS[kind])
    assert sorted(p.name for p in made.iterdir()) == before


@pytest.mark.run
@pytest.mark.parametrize("kind", FOLDERS)
def test_out_of_export(made, kind):
    before = sorted(p.name for p in made.iterdir())
    said(run_tool(made, f"tools.export run {FOLDERS[kind]}"), FOLDERS[kind])
    assert sorted(p.name for p in made.iterdir()) == before


@pytest.mark.run
@pytest.mark.parametrize("kind", FOLDERS)
def test_out_of_prepare_and_compare(made, kind):
    said(tool(made, prepare.main, f"{FOLDERS[kind]} --data corpus.txt"), FOLDERS[kind])
    line = f'compare {FOLDERS[kind]} --methods "adamw @ 1e-3 = baseline" -- {TINY}'
    said(here(made, line), FOLDERS[kind])


@pytest.mark.run
@pytest.mark.parametrize(("kind", "flag"), covering(INPUTS, ["--resume", "--tokenizer", "--data", "--validation"]))
def test_what_a_run_reads(made, flag, kind):
    if flag in ("--data", "--validation") and kind == "an empty file":
        pytest.skip("an empty document is a document")
    done = here(made, f"baseline {TINY} {flag} {INPUTS[kind]} --out new")
    said(done, INPUTS[kind])
    assert not (made / "new").exists()


@pytest.mark.parametrize("kind", INPUTS)
def test_what_tools_read(made, kind):
    name = INPUTS[kind]
    said(tool(made, inspect.main, name), name)
    said(tool(made, inspect.main, f"run --compare {name}"), name)
    said(tool(made, generate.main, name), name)
    said(tool(made, plot.main, f"{name} --out a.png"), name)
    if kind != "an empty folder":
        said(tool(made, generate.main, f"run --tokenizer {name}"), name)


@pytest.mark.parametrize("kind", FILES)
def test_what_tools_write(made, kind, monkeypatch):
    name = FILES[kind]

    def work(*arguments, **options):
        raise AssertionError("the work was done before the path was looked at")

    monkeypatch.setattr(inspect, "inspect", work)
    monkeypatch.setattr(plot, "series", work)
    monkeypatch.setattr(bench, "measure", work)
    said(tool(made, inspect.main, f"run --png {name}"), name, (2,))
    said(tool(made, plot.main, f"run --out {name}"), name, (2,))
    said(tool(made, lambda words: bench.main(bench.StepBench(json=Path(words[0]))), shlex.quote(name)), name, (2,))
    assert not (made / "missing").exists()


def test_a_file_that_can_be_written_stays_as_it_is(tmp_path):
    there = tmp_path / "a.png"
    there.write_text("kept")
    assert writable(there, "--png") == there and there.read_text() == "kept"
    writable(tmp_path / "new.png", "--png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    import errno
    import os

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="--png .*a.png: cannot be written: No space left on device; make room"):
        writable(tmp_path / "a.png", "--png")
    assert not list(tmp_path.iterdir())
    said_of_run = here(corpus(tmp_path / "c"), f"baseline {TINY} --out run")
    assert said_of_run.code == 2 and "--out run: cannot be written: No space left" in said_of_run.err, said_of_run
    assert not (tmp_path / "c" / "run").exists()
    shutil.rmtree(tmp_path / "c")


@pytest.mark.run
def test_a_run_writes_over_no_checkpoint_and_no_other_models_config(tmp_path):
    folder = corpus(tmp_path)
    assert here(folder, f"baseline {TINY} --steps 2 --out run").code == 0
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 16}')
    taken = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for out in ("run/step-00000002", "run/step-00000007", "model"):
        for resume in ("never", "auto", "run"):
            done = here(folder, f"baseline {TINY} --steps 2 --out {out} --resume {resume}")
            assert done.code == 2 and f"--out {out}: " in done.err, done
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == taken


@pytest.mark.run
def test_home_is_home_in_every_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = corpus(tmp_path)
    done = here(folder, f"baseline {TINY} --steps 2 --out=~/run")
    assert done.code == 0 and (tmp_path / "home/run/step-00000002").is_dir(), done
    done = here(folder, f"baseline {TINY} --steps 3 --resume=~/run")
    assert done.code == 0 and (tmp_path / "home/run/step-00000003").is_dir(), done
    assert not (folder / "~").exists()


SIZES = (0, 10, 1000, 12000)
LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from tools.prepare import main
for size in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))
    assert main(["made", "--data", "corpus.txt"]) == 2
"""


@pytest.mark.run
def test_a_disk_that_fills_up_names_the_file(tmp_path):
    folder, environment = corpus(tmp_path), {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIMIT, *map(str, SIZES)]
    done = subprocess.run(command, cwd=folder, stdout=-1, stderr=-1, text=True, env=environment)
    assert done.returncode == 0, done
    lines = done.stderr.splitlines()
    assert len(lines) == len(SIZES) and "Traceback" not in done.stderr
    assert all(line.startswith("error: OUT made: ") and "(made/" in line for line in lines), lines


@pytest.mark.run
def test_names_are_no_formulas_and_need_no_font(tmp_path, recwarn):
    """$ is math to the library that draws, and characters that its font lacks are warnings."""
    name = "$HOME/\\frac$ \u6f22\u5b57"
    assert loss_curve(tmp_path / "a.png", {name: ([1, 2], [3.0, 2.0]), "b": ([1], [2.0])}, name, name).exists()
    assert loss_curve(tmp_path / "b.png", {f"{name}{i}": ([1], [2.0]) for i in range(12)}, name).exists()
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
