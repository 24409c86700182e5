"""The command `leanstep`: every recipe and tool by its name, `leanstep sumo demo` for `python -m recipes.sumo demo`.

It is also `python -m leanstep`. In a clone recipes and tools lie beside this package; where pip installed them, in it.
"""

import ast
import difflib
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
INSTALLED = (HERE / "recipes").is_dir()
ROOT, PREFIX = (HERE, f"{HERE.name}.") if INSTALLED else (HERE.parent, "")
PROGRAM = "python -m leanstep" if __name__ == "__main__" else "leanstep"
KINDS = {"recipes": "Recipes, which train", "tools": "Tools, around a training run"}


class Command(NamedTuple):
    """A module that can be run, in which of the two packages it lies, and what its docstring says first."""

    module: str
    package: str
    about: str


def commands() -> dict[str, Command]:
    """All commands by name. Files are read, not imported."""
    found: dict[str, Command] = {}
    for package in KINDS:
        for file in sorted([*(ROOT / package).glob("*.py"), *(ROOT / package).glob("*/__main__.py")]):
            text = file.read_text(encoding="utf-8")
            if "\nif __name__ == " not in text:
                continue
            name = file.parent.name if file.stem == "__main__" else file.stem
            found[name] = Command(f"{PREFIX}{package}.{name}", package, about(text))
    return found


def about(source: str) -> str:
    """What the docstring of a file says first: a sentence, without the command after it."""
    said = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return re.split(r": `|[;.](?: |$)", said, maxsplit=1)[0]


def overview(known: dict[str, Command]) -> str:
    """What `leanstep --help` says."""
    lines = [f"usage: {PROGRAM} COMMAND [ITS FLAGS]", f"       {PROGRAM} COMMAND --help"]
    for package, title in KINDS.items():
        lines += ["", title]
        lines += [f"  {name:10} {own.about}" for name, own in known.items() if own.package == package]
    return "\n".join(lines)


def main() -> None:
    """Run the command that was typed, as `python -m` would; without one, list them. Exit code 2 for one unknown."""
    known = commands()
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview(known))
    elif name == "--version":
        print(version("leanstep"))
    elif name in known:
        sys.argv = [sys.argv[0], *flags]
        typed = {"__command__": f"{PROGRAM} {name}"}  # for usage lines: engine.terminal.command
        runpy.run_module(known[name].module, typed, "__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"perhaps {near[0]}; " if near else ""
        print(f"error: got {name!r}, expected a command; {hint}see {PROGRAM} --help", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
