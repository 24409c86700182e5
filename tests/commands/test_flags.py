"""What cannot be read on a command line: one plain line that names what was typed, and exit code 2."""

import contextlib
import re

import pytest
from helpers.grids import covering
from helpers.runs import Done, tool

from engine.terminal import flags
from optimizers.contract import UsageError
from recipes.registry import parsed, words

INTERNAL = ("Traceback", "{", "NoneType", "[bold]", "literal for int", "could not convert", "╭", "--plan", ".py")


def plain(done: Done, *named: str) -> str:
    assert done.code == 2 and not done.out, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: "), line
    for word in named:
        assert word in line, (word, line)
    for word in INTERNAL:
        assert word not in line, (word, line)
    return line


PLAN = [  # what is typed after tools.plan, and what the line must name
    ("nosuch", "'nosuch'", "snsm"),
    ("--fit 24GiB", "expected a recipe"),
    ("compare x", "'compare'"),
    ("omgd toy", "trains no model"),
    ("snsm", "demo, 60m, 130m, 350m, 1b", "python -m tools.plan snsm --help"),
    ("snsm demi", "demi", "demo, 60m"),
    ("snsm demo --rnk 3", "--rnk", "perhaps --rank"),
    ("snsm --rank 3", "--rank 3", "demo, 60m"),
    ("snsm --rank 3 demo", "--rank 3", "flags stand after"),
    ("snsm demo --rank abc", "--rank: got 'abc', expected a whole number"),
    ("snsm demo --lr fast", "--lr: got 'fast', expected a number"),
    ("snsm demo --rank", "--rank: expected a value"),
    ("baseline --optimizer adm", "--optimizer: got 'adm', expected one of adamw, sgd"),
    ("baseline --betas 0.9", "--betas: expected 2 values"),
    ("baseline --recompute yes", "yes"),
    ("baseline --swap-at 100", "--swap-at: got '100', expected a whole number and a text"),
    ("baseline --swap-at x y", "--swap-at: got 'x' 'y', expected a whole number and a text"),
    ("baseline --model 8b", "--model", "'8b'"),
    ("baseline --micro-batch 0", "--micro-batch", "0"),
    ("baseline --fit", "--fit: got ''"),
    ("baseline --fit --json", "--fit: got '--json'"),
    ("baseline --fit=", "--fit: got ''"),
    ("baseline --fit 24", "--fit: got '24'", "24GiB"),
    ("baseline --fit iB", "--fit: got 'iB'"),
    ("baseline --fit 1iB", "--fit: got '1iB'"),
    ("baseline --fit -1GiB", "--fit: got '-1GiB'"),
    ("baseline --fit nanGiB", "--fit"),
    ("baseline --fit 0.00001B", "--fit"),
    (f"baseline --fit {'9' * 400}GiB", "--fit"),
    ("baseline --vocabulary 1e3", "--vocabulary: got '1e3'"),
    (f"baseline --vocabulary {'9' * 5000}", "--vocabulary"),
    ("baseline --vocabulary ²", "--vocabulary"),
    ("baseline --json=yes", "--json=yes"),
    ("baseline --tokenizer nowhere.json", "nowhere.json"),
    ("baseline --size.num-attention-heads 0", "num_attention_heads", "0"),
    ("baseline --size.hidden-size 33", "hidden_size", "33"),
]


@pytest.mark.run
@pytest.mark.parametrize("typed", [line for line, *_ in PLAN], ids=lambda line: line[:40])
def test_wrong_input_of_the_planner(tmp_path, typed):
    done = tool(tmp_path, f"tools.plan {typed}")
    plain(done, *next(named for line, *named in PLAN if line == typed))


@pytest.mark.parametrize("unreadable", ["folder", "rubbish", "empty"])
def test_a_tokenizer_that_cannot_be_read(tmp_path, unreadable):
    place = tmp_path / f"{unreadable}.json"
    place.mkdir() if unreadable == "folder" else place.write_text({"rubbish": "{]", "empty": ""}[unreadable])
    plain(tool(tmp_path, f"tools.plan baseline --tokenizer {place.name}"), place.name)


def test_the_planner_says_how_it_is_called(tmp_path):
    usage = "usage: python -m tools.plan RECIPE"
    told = tool(tmp_path, "tools.plan --help")
    assert told.code == 0 and told.out.startswith(usage) and "--plan" not in told.out
    bare = tool(tmp_path, "tools.plan")
    assert bare.code == 2 and bare.err.startswith(usage) and bare.err.splitlines()[-1].startswith("error: no recipe")
    own = tool(tmp_path, "tools.plan snsm --help")
    assert own.code == 0 and own.out.startswith("usage: python -m tools.plan snsm ")


@pytest.mark.run
@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("", "--fresh"),
        ("'snsm demi'", "--fresh: unknown: demi"),
        ("'snsm demo --rnk 3'", "perhaps --rank; see python -m recipes.snsm"),
        ("'snsm demo --rank x'", "--rank: got 'x'"),
        ("'nosuch'", "--fresh: got 'nosuch'"),
        ('"snsm \'demo"', '--fresh: got "snsm \'demo": no closing quotation'),
        ("'omgd toy'", "--fresh: 'omgd toy' trains no model"),
    ],
)
def test_wrong_recipes_in_quotation_marks(tmp_path, typed, named):
    plain(tool(tmp_path, f"tools.inspect --fresh {typed}"), named)


@pytest.mark.run
@pytest.mark.parametrize("line", ["snsm demo --rnk 3", "snsm", "nosuch", "snsm demo --rank x", "baseline --steps 0"])
def test_quoted_recipes_name_the_flag_that_they_came_from(line):
    for flag in ("--to", "--swap-at", "--fresh"):
        with pytest.raises(UsageError, match=f"^{flag}: "):
            parsed(words(line, flag), flag)


COMMANDS = [
    *(f"recipes.{name}" for name in ("baseline", "snsm", "sumo", "rso", "omgd", "finetune", "demo", "compare")),
    *(f"tools.{name}" for name in ("plot", "bench", "inspect", "swap", "prepare", "generate", "evaluate")),
]


@pytest.mark.run
@pytest.mark.parametrize(("name", "columns"), covering(COMMANDS, ["30", "80"]))
def test_every_command_refuses_a_flag_in_one_line(tmp_path, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", columns)
    line = plain(tool(tmp_path, f"{name} --a-flag-that-nothing-here-has 1"))
    assert f"see python -m {name}" in line
    assert list(tmp_path.iterdir()) == []


def test_a_box_that_is_not_understood_is_told_as_it_is():
    assert flags.line("") == ""
    assert flags.line("╭─ New ─╮\n│ Two words │\n│ more      │\n╰───╯") == "Two words more"

    def ends(code):
        def parse(program):
            raise SystemExit(code)

        return parse

    with pytest.raises(UsageError, match=re.escape("see x --help")):
        flags.ask(ends(2), "x")
    with contextlib.suppress(SystemExit):
        flags.ask(ends(0), "x")
        pytest.fail("--help ends the process")
