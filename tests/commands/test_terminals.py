"""Terminals that know few characters, names that are no Unicode, prompts that cannot be said: no traceback anywhere."""

import contextlib
import io
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from helpers.grids import covering

from engine.data.prompt import prompt_ids
from engine.data.tokenizer import load_tokenizer
from engine.terminal.output import printable
from models.llama import PRESETS
from optimizers.contract import UsageError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("recipes", "tools")
    for file in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
)
ENCODINGS = ("ascii", "latin-1", "cp1252")
TINY = shlex.split(
    "--compile off --no-check-memory --sequence 16 --micro-batch 2 --steps 2 --eval-windows 2 --size.hidden-size 16 "
    "--size.intermediate-size 24 --size.num-hidden-layers 1 --size.num-attention-heads 2"
)


def run(module: str, *arguments: str, encoding: str, folder: Path) -> tuple[int, str, str]:
    """`python -m module` in `folder`, in this process, on streams of that encoding that refuse other characters."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    argv, code = sys.argv, 0
    sys.argv = [module, *arguments]
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    said = []
    for stream in streams:
        stream.flush()
        said.append(stream.buffer.getvalue().decode(encoding))
    return code, said[0], said[1]


def text_in(folder: Path) -> str:
    path = folder / "café — 東京.txt"
    path.write_text("naïve 東京 — 🙂 text\n" * 200, encoding="utf-8")
    return str(path)


def test_every_command_is_found() -> None:
    assert {"recipes.snsm", "recipes.compare", "tools.plan", "tools.generate", "tools.prepare"} <= set(COMMANDS)


@pytest.mark.run
@pytest.mark.parametrize(("module", "encoding"), covering(COMMANDS, ENCODINGS))
def test_every_command_explains_itself_on_any_terminal(module: str, encoding: str, tmp_path: Path) -> None:
    code, out, err = run(module, "--help", encoding=encoding, folder=tmp_path)
    assert code == 0 and "usage" in (out + err).lower()
    assert "Traceback" not in out + err


@pytest.mark.run
@pytest.mark.parametrize(("module", "encoding"), covering(COMMANDS, ENCODINGS))
def test_every_command_refuses_on_any_terminal(module: str, encoding: str, tmp_path: Path) -> None:
    code, out, err = run(module, "--café-東京", "\udcff", encoding=encoding, folder=tmp_path)
    assert code == 2 and err and "Traceback" not in out + err


@pytest.mark.run
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_whole_run_on_any_terminal(encoding: str, tmp_path: Path) -> None:
    text = text_in(tmp_path)
    made = run("tools.prepare", "día — 東京", "--data", text, encoding=encoding, folder=tmp_path)
    assert made[0] == 0 and "ready" in made[1]
    out = "laufende Übung — 走る"
    data = ("--data", "día — 東京", "--out", out, "--prompt", "naïve 東京 🙂")
    done = run("recipes.baseline", *TINY, *data, encoding=encoding, folder=tmp_path)
    assert done[0] == 0, done[2]
    assert "a sample" in done[1] and (tmp_path / out / "step-00000002").is_dir()
    said = run(
        "tools.generate", out, "--prompt", "東京", "--max-new-tokens", "3", "--device", "cpu",
        encoding=encoding, folder=tmp_path,
    )  # fmt: skip
    assert said[0] == 0 and said[1].startswith("??")
    seen = run("tools.inspect", out, encoding=encoding, folder=tmp_path)
    assert seen[0] == 0, seen[2]
    drawn = run("tools.plot", out, "--out", "Bild — 東京.png", encoding=encoding, folder=tmp_path)
    assert drawn[0] == 0, drawn[2]


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder, data = os.fsdecode(b"run \xff\xfe"), os.fsdecode(b"text \xff.txt")
    (tmp_path / data).write_text("some text\n" * 500)
    flags = (*TINY, "--data", data, "--out")
    code, out, err = run("recipes.baseline", *flags, folder, encoding="utf-8", folder=tmp_path)
    assert code == 2 and err.startswith("error: --out run \\udcff\\udcfe: a name that is not UTF-8") and not out
    code, out, err = run("recipes.baseline", *flags, "run", encoding="utf-8", folder=tmp_path)
    assert code == 0 and "\\udcff" in out, err
    (tmp_path / "run").rename(tmp_path / folder)
    for tool in (("generate", folder, "--max-new-tokens", "2", "--device", "cpu"), ("inspect", folder)):
        code, out, err = run(f"tools.{tool[0]}", *tool[1:], encoding="utf-8", folder=tmp_path)
        assert code == 5 and not out and err.count("\n") == 1  # safetensors opens no such path, and says so
    missing = os.fsdecode(b"no \xff.txt")
    for module in ("recipes.baseline", "tools.prepare"):
        where = () if module.startswith("recipes") else ("out",)
        code, out, err = run(module, *where, "--data", missing, encoding="utf-8", folder=tmp_path)
        assert code == 2 and err.startswith("error: no \\udcff.txt")


def test_names_are_not_markup(tmp_path: Path) -> None:
    (tmp_path / "[b]data").mkdir()
    (tmp_path / "[b]data/a.txt").write_text("some text\n" * 500)
    (tmp_path / "[b]data/[red]x.pdf").symlink_to("nowhere")
    code, out, err = run("tools.prepare", "[i] :key:", "--data", "[b]data", encoding="utf-8", folder=tmp_path)
    assert code == 0, err
    assert "[b]data: passed over 1 link to nothing ([red]x.pdf)" in out.replace("\n", " ") and "[i] :key:: ready" in out


@pytest.mark.run
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"PYTHONIOENCODING": "latin-1"}, marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},  # files are opened as ASCII too
    ],
    ids=["latin-1", "C", "C without UTF-8"],
)
def test_a_run_in_a_process_of_its_own(environment: dict[str, str], tmp_path: Path) -> None:
    text_in(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command, last = ["recipes.baseline", *TINY, "--prompt", "東京 naïve"], b"a sample"
    if "PYTHONUTF8" in environment:  # in which torch cannot read its own files
        command, last = ["tools.prepare", "día — 東京"], b"ready"
    done = subprocess.run(
        [sys.executable, "-m", *command, "--data", "*.txt"],
        cwd=tmp_path, env=env, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and last in done.stdout, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr


def test_printable_leaves_other_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        printable()


# Prompts


def lossy(folder: Path) -> str:
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("abcdefghij klmnopqrstuvwxyz")}, []))
    core.add_special_tokens(["</s>"])
    core.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_a_prompt_is_checked(tmp_path: Path) -> None:
    byte, small = load_tokenizer("byte"), load_tokenizer(lossy(tmp_path))
    assert prompt_ids(byte, "ab", 2) == ([97, 98], "")
    assert prompt_ids(byte, "", 1) == ([256], "") and prompt_ids(small, "", 1) == ([small.eos], "")
    ids, remark = prompt_ids(small, "ab東京", 9)
    assert ids == [0, 1] and remark == "--prompt: '東京' is unknown to the tokenizer"
    for tokenizer, prompt, message in (
        (byte, "abc", "prompt: got 3 tokens, expected 1 to max_position_embeddings = 2; shorten it"),
        (byte, "a\udcff", "--prompt: got bytes that are not UTF-8, at character 1"),
        (small, "東京", "--prompt: got '東京', of which the tokenizer .*json can say nothing"),
        (small, "東 京", "--prompt: got '東 京', of which .* can say nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            prompt_ids(tokenizer, prompt, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("東京", "can say nothing"), ("x" * 5000, "prompt: got 5000 tokens"), ("\udcff", "bytes that are not UTF-8")],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_training(
    prompt: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    data = ("--data", "a.txt", "--out", "run", "--tokenizer", lossy(tmp_path), "--allow-unknown", "0.2")
    code, _, err = run("recipes.baseline", *TINY, *data, "--prompt", prompt, encoding="utf-8", folder=tmp_path)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run/metrics.jsonl").exists() and not list((tmp_path / "run").glob("step-*"))


def test_a_prompt_as_long_as_the_positions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    positions = PRESETS["demo"].max_position_embeddings
    code, out, err = run(
        "recipes.baseline", *TINY, "--data", "a.txt", "--prompt", "x" * positions, encoding="utf-8", folder=tmp_path
    )
    assert code == 0 and "a sample" in out, err
