"""What the docs tell people to type works, and what they name exists.

A ```python block is run, after those above it on its page. A ```sh block is run line by line, on tiny sizes. A block is
left out only where `<!-- not run: reason -->` stands before it, or `<!-- needs: package, package -->` names one
that is not installed.
"""

import contextlib
import glob
import io
import lzma
import random
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
HISTORY = {"docs/log.md"}  # names what was, not what is
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SKIP = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
NEEDS = re.compile(r"<!-- needs: (.+?) -->\s*\Z")

MODEL = "--sequence 16 --micro-batch 2 --size.hidden-size 64 --size.intermediate-size 96 --size.num-hidden-layers 4 "
MODEL += "--size.num-attention-heads 2 "
RUN = MODEL + "--compile off --no-check-memory --warmup 1 --eval-windows 2 --log-every 1 --rest-lr 1e-3 "
TINY = {  # what is added to a command, so that it takes a second
    "recipes.baseline": RUN,
    "recipes.snsm": RUN,
    "recipes.sumo": RUN,
    "recipes.omgd": RUN,
    "recipes.rso": RUN,
    "recipes.compare": RUN,
    "recipes.finetune": "",
    "tools.evaluate": "",
    "tools.plan": MODEL,
    "tools.prepare": "",
    "tools.inspect": "",
    "tools.swap": "",
    "tools.generate": "--max-new-tokens 4",
    "tools.export": "",
}
STEPS = {"--steps": "6", "--train-bpe": "280", "--model": "demo"}  # numbers that are made small wherever they stand

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


class Block(NamedTuple):
    language: str
    text: str
    skipped: str  # the reason why it is not run
    needs: tuple[str, ...] = ()  # packages without which it cannot be run


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        skip, needs = SKIP.search(before), NEEDS.search(before)
        yield Block(match[2], match[3], skip[1] if skip else "", tuple(needs[1].split(", ")) if needs else ())


def lines(text: str) -> list[str]:
    """The commands of a shell block, without comments."""
    whole = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#\s.*", "", one).strip() for one in whole) if line]


def with_blocks(language: str, test: str) -> Any:
    def runs(page: Path) -> bool:
        return any(b.language == language and not b.skipped and test in b.text for b in blocks(page.read_text()))

    own = [page for page in PAGES if runs(page)]
    return pytest.mark.parametrize("page", own, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with texts under the names that the docs use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that a command starts
    draw = random.Random(0)
    words = ["the", "a", "step", "of", "loss", "grad", "basis", "rank", "tensor", "and"]
    texts = [" ".join(draw.choices(words, k=60)) for _ in range(60)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mine.txt").write_text("\n".join(texts))
    with lzma.open(tmp_path / "corpus" / "mine.jsonl.xz", "wt") as file:
        file.writelines(f'{{"text": "{text}"}}\n' for text in texts)
    return tmp_path


@pytest.mark.run
@with_blocks("python", "")
def test_the_python_of_a_page_runs(page: Path, folder: Path) -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text()
    lacking: dict[str, None] = {}
    for block in blocks(text):
        if block.language == "python" and not block.skipped:
            if absent := [package for package in block.needs if find_spec(package) is None]:
                lacking |= dict.fromkeys(absent)
                continue
            line = text[: text.index(block.text)].count("\n")
            code = compile("\n" * line + block.text, str(page), "exec")
            exec(code, scope)
    if lacking:
        pytest.skip(f"all but the blocks that need {', '.join(lacking)} were run")


@pytest.mark.slow
@pytest.mark.run
@with_blocks("sh", "python -m")
def test_the_commands_of_a_page_run(page: Path, folder: Path) -> None:
    for block in blocks(page.read_text()):
        if block.language == "sh" and not block.skipped:
            for line in lines(block.text):
                if line.startswith("python -m "):
                    code, said = run(line)
                    assert code == 0, f"{line}\n{said[-2000:]}"


def run(line: str) -> tuple[int, str]:
    """A command of the docs, made tiny, in this process; returns its exit code and what it said."""
    words = [part for word in shlex.split(line)[2:] for part in (sorted(glob.glob(word)) or [word])]
    module, words = words[0], words[1:]
    for i, word in enumerate(words[:-1]):
        words[i + 1] = STEPS.get(word, words[i + 1])
    if module == "recipes.compare" and "--" not in words:
        words.append("--")
    added = TINY[module].removeprefix(MODEL if "--init" in words else "").split()  # a published model has its sizes
    words += added + ["--sequence", "16"] * ("--init" in words)
    out, argv, code = io.StringIO(), sys.argv, 0
    sys.argv = [module, *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return code, out.getvalue()


@each_page
def test_what_is_linked_and_named_exists(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    if page.relative_to(ROOT).as_posix() in HISTORY:
        return
    for path in re.findall(r"`((?:optimizers|engine|models|recipes|tools|tests|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    named = re.findall(r"python -m ((?:recipes|tools|engine|optimizers|models)[\w.]*)", text)
    named += re.findall(r"`((?:recipes|tools|engine|optimizers|models)\.[\w.]+)[` ]", text)
    for name in named:
        assert known(name), name


def known(name: str) -> bool:
    """A module, or something in one."""
    with contextlib.suppress(ModuleNotFoundError):
        if find_spec(name):
            return True
    module, _, attribute = name.rpartition(".")
    return bool(module) and known(module) and hasattr(__import__(module, fromlist=[attribute]), attribute)


@each_page
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert not block.skipped or len(block.skipped) > 10, block.text[:80]
        if block.language == "sh" and not block.skipped:
            for line in lines(block.text):
                module = re.match(r"python -m (\S+)", line)
                assert module is None or module[1] in TINY, f"{line}: how is it made tiny?"


def test_a_false_name_would_be_seen() -> None:
    assert known("tools.plan") and known("engine.step.step.Step")
    assert not known("tools.nothing") and not known("engine.step.step.Nothing")
    assert [b.skipped for b in blocks("<!-- not run: no such thing -->\n```sh\nx\n```\n```sh\ny\n```\n")] == [
        "no such thing",
        "",
    ]
    assert [b.needs for b in blocks("<!-- needs: a, b -->\n```python\nx\n```\n```python\ny\n```\n")] == [("a", "b"), ()]
    assert lines("a b  # c\n# d\ne \\\n  f") == ["a b", "e    f"]
