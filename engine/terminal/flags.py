"""Flags as they were typed, and one plain line where they cannot be read."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from typing import TypeVar

from optimizers.contract import UsageError

from .command import typed

Read = TypeVar("Read")
KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path", "STR": "a text"}
WIDE = "100000"  # columns: the parser breaks no line


def ask(parse: Callable[[str], Read], program: str = "") -> Read:
    """What `parse` makes of the flags, given the name of the program for its usage line.

    Raises UsageError where it ends the process for a wrong flag: its box of several lines becomes one.
    """
    program = program or typed()
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return parse(program)
    except SystemExit as end:
        if end.code != 2:
            raise
    columns = os.environ.get("COLUMNS")
    box = io.StringIO()
    try:
        os.environ["COLUMNS"] = WIDE
        with contextlib.redirect_stderr(box), contextlib.suppress(SystemExit):
            parse(program)
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    raise UsageError(line(box.getvalue()) or f"flags that cannot be read; see {program} --help")


def line(box: str) -> str:
    """The parser's box as one line: what is wrong, what may have been meant, and where the help is."""
    parts = sections(box)
    if not parts:
        return ""
    (first, *more), said = parts[0], parts[1:]
    what = " ".join(word.strip() for word in (first, *more))
    placed = [found[1] for text in more if (found := re.match(r" +(.*) \(applied to .*\)$", text))]
    if re.match(r"Missing from .*:", first):
        what = "expected " + ", ".join(text.strip() for text in more if re.match(r" {4}\S", text))
        what += "".join(f"; unknown: {' '.join(map(str.strip, x))}" for head, *x in said if head.startswith("Unrec"))
    elif placed:
        what = "unknown, or in the wrong place: " + " ".join(placed)
    elif found := re.match(r"Unrecognized options: (.*)", what):
        what = f"unknown: {found[1].replace(', ', ' ')}"
    elif found := re.match(r"Expected one of \{(.*)\}\.", what):
        what = f"expected one of {found[1]} first"
    elif found := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*?),?\)\.", what):
        what = f"{found[2]}: got {found[1]}, expected one of {found[3].replace(chr(39), '')}"
    elif found := re.match(r"Missing value for argument '(.*)'\. Expected (\d+) values?\.", what):
        what = f"{found[1]}: expected {'a value' if found[2] == '1' else found[2] + ' values'} after it"
    elif found := re.match(r"Error parsing (\S+): (.*)", what):
        what = f"{found[1]}: {wrong_value(found[2], said)}"
    hints = [what, *meant(said, placed), *where(said)]
    return "; ".join(" ".join(hint.split()) for hint in hints)


def sections(box: str) -> list[list[str]]:
    """The lines between the rules of a box, without its border, its title and its colours."""
    lines = [text.rstrip() for text in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    bordered = lines[:1] and lines[0].startswith("╭")
    inside = [text[2:-1].rstrip() for text in lines[1:-1]] if bordered else [text[2:] for text in lines[2:]]
    found: list[list[str]] = [[]]
    for text in inside:
        if text and not text.strip("─-"):
            found.append([])
        elif text.strip():
            found[-1].append(text)
    return [part for part in found if part]


def wrong_value(why: str, said: list[list[str]]) -> str:
    """ "got 'x', expected a whole number", where the parser names its own types."""
    kinds = next((part[1].split(maxsplit=1) for part in said if part[0] == "Argument helptext:"), [])
    expected = kinds[1] if len(kinds) > 1 else ""
    if expected.startswith("{None}|"):
        expected = expected.removeprefix("{None}|").removeprefix("{").removesuffix("}")
    expected = " and ".join(kind_of(kind) for kind in expected.split())
    if several := re.search(r"instantiated from \[(.*?)\]\.", why):
        got = several[1].replace("', '", "' '")
    elif one := re.search(r"('[^']*'|\"[^\"]*\")[^'\"]*$", why):
        got = one[1]
    else:
        return why
    return f"got {got}" + (f", expected {expected}" if expected else "")


def kind_of(text: str) -> str:
    """A type as words, of which one may be a choice: "INT|{heuristic,sqrt}"."""
    parts = [KINDS.get(part, part.strip("{}")) for part in text.split("|")]
    return " or ".join(f"one of {part.replace(',', ', ')}" if "," in part else part for part in parts)


def meant(said: list[list[str]], placed: list[str]) -> list[str]:
    """The flags that are like the wrong one, and the words that may stand in its place."""
    hints, words = [], []
    for head, *texts in said:
        if found := re.match(r"Available subcommands: (.*)", head):
            words = [f"expected one of {found[1]} first"]
        if head.startswith(("Perhaps you meant", "Arguments similar to")):
            hints += [found[1] for text in texts if (found := re.match(r" {4}(--[^ ,=]+)", text))]
    near = [hint for hint in dict.fromkeys(hints) if hint not in placed]
    after = [] if near or not placed or words else ["flags stand after the word that they belong to"]
    return words + ([f"perhaps {' or '.join(near[:3])}"] if near else []) + after


def where(said: list[list[str]]) -> list[str]:
    """The command that prints the help."""
    found = (re.match(r"For full helptext, (?:run|see):? ?(.*)", " ".join(part)) for part in said)
    return [f"see {match[1]}" for match in found if match]
