"""Commands as people type them: what started this program, and lines that can be pasted into a shell."""

import shlex
import sys
from pathlib import Path

AS_TYPED = "__command__"  # in the module that is run, where `leanstep` runs it


def typed() -> str:
    """How this program was started, for its usage line: `python -m recipes.snsm`, `leanstep snsm`, or
    `python recipes/snsm.py`."""
    main = sys.modules["__main__"]
    if started := getattr(main, AS_TYPED, ""):
        return str(started)
    spec = getattr(main, "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def module(name: str) -> str:
    """`name`, such as "tools.generate", as `python -m` takes it here: pip installs all packages in `leanstep`."""
    return __name__.removesuffix("engine.terminal.command") + name


def another(name: str) -> list[str]:
    """The words that start another command, the module `name` as a clone calls it, in the way this one was started:
    python -m tools.generate, or leanstep generate."""
    if started := getattr(sys.modules["__main__"], AS_TYPED, ""):
        return [*str(started).split()[:-1], name.rpartition(".")[2]]
    return ["python", "-m", module(name)]


def program(name: str) -> str | Path:
    """What to type for a program of this environment: its path where the environment lies below this folder."""
    folder, here = Path(sys.prefix), Path.cwd()
    return folder.relative_to(here) / "bin" / name if folder.is_relative_to(here) else name


def pasted(*words: str | Path) -> str:
    """The words as a line for the shell: quoted where they need it. A path never looks like a flag."""
    return " ".join(_quoted(path(word) if isinstance(word, Path) else word) for word in words)


def _quoted(word: str) -> str:
    """As a shell reads it; what a terminal does not show, such as a tab, is written as bash and zsh read it."""
    if word.isprintable() or not any(ord(c) < 32 or ord(c) == 127 for c in word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(f"\\x{ord(c):02x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + "'"


def path(place: Path) -> str:
    """`place`, with ./ before it where it would be read as a flag."""
    return f"./{place}" if str(place).startswith("-") else str(place)
