"""What comes after a run is trained and saved: where it fails that is a line, and the run is done all the same."""

import io
import json
import shlex
from pathlib import Path

import pytest
from helpers.classifier import run as fitted
from helpers.runs import TINY, corpus, here, tool
from rich.console import Console

from engine import fit as fits
from engine.checkpoint import latest
from engine.loop.metrics import Metrics
from recipes import demo
from recipes.compare import Compare, compare, save


def blocked(*files: Path) -> None:
    """Folders where files are to be written."""
    for file in files:
        (file / "in the way").mkdir(parents=True)


def lines(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{name} ")]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300, markup=False, emoji=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_fit_is_done_though_its_numbers_are_not_written(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fits, "write_result", full)
    done = fitted(tmp_path / "run", steps=4)
    assert done.steps == 4 and done.checkpoint == latest(tmp_path / "run").path
    out = capsys.readouterr().out
    assert lines(out, "numbers") == ["numbers      not written: OSError: [Errno 28] No space left on device"]
    assert lines(out, "checkpoint") == [f"checkpoint   {done.checkpoint}"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_run_is_done_though_its_last_events_are_not_recorded(tmp_path, monkeypatch, capsys, kind):
    """TensorBoard's writer raises what its thread met, of whatever kind, when it is closed."""
    closed = Metrics.__exit__

    def close(self, *raised):
        def full():
            raise kind("no room")

        self.writer.close()
        self.writer.close = full
        closed(self, *raised)

    monkeypatch.setattr(Metrics, "__exit__", close)
    done = fitted(tmp_path / "run", steps=4)
    assert done.checkpoint == latest(tmp_path / "run").path
    said = f"warning: the last TensorBoard events are not recorded: {kind.__name__}: no room"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.run
@pytest.mark.parametrize("name", ["condition.png", "condition.json"])
def test_moments_that_cannot_be_written_are_a_line(tmp_path, name):
    blocked(tmp_path / "run" / name)
    done = here(corpus(tmp_path), f"sumo condition {TINY} --rank 4 --steps 2 --every 2 --out run")
    assert done.code == 0, done.err
    (line,) = lines(done.out, "moments")
    other, what = ("json", "drawn") if name.endswith("png") else ("png", "written")
    assert f"not {what}: IsADirectoryError" in line and f"run/condition.{other}" in line
    assert "[least, most]" in done.out and (tmp_path / "run" / f"condition.{other}").is_file()


@pytest.mark.run
def test_a_dry_run_has_no_moments(tmp_path):
    done = here(corpus(tmp_path), f"sumo condition {TINY} --rank 4 --steps 2 --dry-run --out run")
    assert done.code == 0 and not lines(done.out, "moments"), done


@pytest.mark.run
def test_a_swap_whose_report_cannot_be_written_is_saved(tmp_path):
    assert here(corpus(tmp_path), f"baseline {TINY} --steps 2 --eval-every 2 --out run").code == 0
    blocked(tmp_path / "new" / "swap.json")
    done = tool(tmp_path, 'tools.swap run new --to "snsm demo --rank 4"')
    assert done.code == 0, done.err
    assert lines(done.out, "converted") == ["converted    new/step-00000002"]
    (line,) = lines(done.out, "report")
    assert line.startswith("report       not written: IsADirectoryError")
    assert latest(tmp_path / "new").path == tmp_path / "new" / "step-00000002"


@pytest.mark.run
def test_the_demo_tells_of_the_runs_that_it_can_read(tmp_path, console):
    """One run without numbers, one too short to have a speed, and no picture."""
    for name in ("sumo", "adamw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.0}) + "\n")
    result = {"eval/loss": 1.5, "state_bytes": 10**6, "curve": [[1, 1.5]], "seconds_per_step": None}
    (tmp_path / "adamw" / "result.json").write_text(json.dumps(result))
    blocked(tmp_path / "loss.png")
    demo.report(tmp_path, ["SUMO", "AdamW"], 1, console)
    out = printed(console)
    assert lines(out, "SUMO")[0].startswith("SUMO         not read: FileNotFoundError")
    assert "1.5000" in out
    assert lines(out, "curves")[0].startswith("curves       not drawn: IsADirectoryError")


@pytest.mark.run
def test_the_toys_print_what_they_found_without_a_picture(tmp_path):
    blocked(*(tmp_path / "toy" / name for name in ("toy.png", "toy.json", "counterexample.png")))
    done = here(tmp_path, "rso toy --steps 100 --out toy")
    assert done.code == 0, done.err
    assert "least squares" in done.out and lines(done.out, "picture")[0].startswith("picture not drawn: IsADirectory")
    done = here(tmp_path, "omgd toy --samples 10 --steps 2000 --seeds 1 --dimension 4 --out toy")
    assert done.code == 0, done.err
    assert "squared distance from the solution" in done.out
    assert lines(done.out, "picture")[0].startswith("picture not drawn: IsADirectoryError")
    assert lines(done.out, "numbers")[0].startswith("numbers not written: IsADirectoryError")


@pytest.mark.parametrize("missing", ["table", "picture"])
def test_a_comparison_is_told_without_its_table_or_picture(tmp_path, console, missing):
    """Every cell is there already."""
    cell = {"method": "a", "lr": 1e-3, "seed": 0, "loss": 1.5, "curve": [(1, 2.0), (2, 1.5)], "steps": 2}
    save(tmp_path, {shlex.join(["baseline", "--lr", "0.001", "--seed", "0"]): cell})
    files = {"table": tmp_path / "table.md", "picture": tmp_path / "curves.png"}
    blocked(files[missing])
    compare(Compare(tmp_path, ("a @ 1e-3 = baseline",)), [], console)
    out = printed(console)
    assert "| a | 0.001 | 1.5000 (n=1) |" in out
    for name, file in files.items():
        (line,) = lines(out, name)
        assert ("not " in line and "IsADirectoryError" in line) if name == missing else line.endswith(file.name)
