"""Commands that are printed: usage lines say what was typed, and lines can be pasted into a shell as they are."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.grids import few
from helpers.runs import TINY, corpus, here, tool

from engine.terminal.command import pasted

RECIPES = ["baseline", "snsm", "sumo", "rso", "omgd", "finetune", "demo", "compare"]
TOOLS = ["plan", "plot", "bench", "inspect", "swap", "prepare", "generate", "evaluate"]


COMMANDS = [*(f"recipes.{name}" for name in RECIPES), *(f"tools.{name}" for name in TOOLS)]


@pytest.mark.parametrize("name", few(COMMANDS, "recipes.finetune", "recipes.compare", "tools.inspect", "tools.prepare"))
def test_the_usage_line_is_what_was_typed(tmp_path, name):
    done = tool(tmp_path, f"{name} --help")
    assert done.code == 0 and re.match(rf"usage: python -m {re.escape(name)}[ \n]", done.out), done.out[:200]
    wrong = tool(tmp_path, f"{name} --no-such-flag 1")
    assert wrong.code == 2 and "Traceback" not in wrong.err
    assert ".py" not in wrong.err, "the name of a file is nothing that was typed"


@pytest.mark.parametrize("folder", ["a b", "it's", '"so"', "-x", "--run", "$HOME", "a;b", "ü", "plain/below"])
def test_a_printed_path_can_be_pasted(folder):
    command, read = shlex.split(pasted("tool", Path(folder)))
    assert command == "tool" and not read.startswith("-") and Path(read) == Path(folder)


@pytest.mark.parametrize("folder", ["tab\there", "new\nline", "\x1b[31mred", "both'\\\t"])
def test_what_a_terminal_does_not_show_is_pasted_as_an_escape(folder):
    line = pasted("printf", "%s", Path(folder))
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.decode() == folder


@pytest.mark.run
def test_the_commands_at_the_end_of_a_run_can_be_pasted(tmp_path):
    done = here(corpus(tmp_path), f'baseline {TINY} --steps 2 --out "it\'s a run" --prompt=\'-- the "step"\'')
    assert done.code == 0, done.err
    look, more = (
        shlex.split(line.split(maxsplit=n)[n])
        for key, n in (("look at it", 3), ("more text", 2))
        for line in done.out.splitlines()
        if line.startswith(key)
    )
    assert look[1:] == ["--logdir", "it's a run"]
    assert more[1:] == ["-m", "tools.generate", "it's a run", '--prompt=-- the "step"']
