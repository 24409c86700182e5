"""The build backend. What `pip install` puts into site-packages is one package, `leanstep`.

A clone is flat: optimizers, engine, models, recipes and tools lie side by side, and run as they lie. In site-packages
these names would meet everybody's own, so a wheel is built from a copy of the clone in which they lie in `leanstep`:

    from engine.fit import fit      reads there     from leanstep.engine.fit import fit
    python -m recipes.sumo          in a docstring  leanstep sumo

Nothing else is another there: code that names its modules while it runs asks `engine.terminal.command.module`. An
editable install, and a source distribution, are the clone as it is.
"""

import ast
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_editable, build_sdist, get_requires_for_build_wheel

__all__ = ["build_editable", "build_sdist", "build_wheel", "get_requires_for_build_wheel"]

ROOT = Path(__file__).resolve().parent
NAME = "leanstep"
ROOMS = ("optimizers", "engine", "models", "recipes", "tools")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
IN_TEXT = (
    (re.compile(r"\bpython -m (?:recipes|tools)\.(?=[\w<])"), f"{NAME} "),
    (re.compile(rf"\bfrom (?=(?:{'|'.join(ROOMS)})\b[\w.]* import )"), f"from {NAME}."),
)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """The hook of PEP 517: writes the wheel into `wheel_directory` and returns its name."""
    target = os.path.abspath(wheel_directory)
    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder))
        with contextlib.chdir(folder):
            return str(build_meta.build_wheel(target, config_settings))


def gather(folder: Path) -> None:
    """Copy the clone into `folder`, the rooms into its one package."""
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / NAME, folder / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            copy = folder / NAME / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(inside(file.read_bytes(), str(file)))


def inside(source: bytes, file: str) -> bytes:
    """The source of a module, UTF-8, as it reads inside the one package.

    Raises SyntaxError for `import engine.x`, which binds `engine`: there it would bind another name.
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for at, end, new in sorted(changes(ast.parse(source, file), source, starts, file), reverse=True):
        source = source[:at] + new + source[end:]
    return source


def changes(tree: ast.AST, source: bytes, starts: list[int], file: str) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, byte after the last, what stands there instead) of imports between rooms and of docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _room(node.module):
            at = source.index((node.module or "").encode(), starts[node.lineno - 1] + node.col_offset + len("from "))
            yield at, at, f"{NAME}.".encode()
        elif isinstance(node, ast.Import):
            for alias in filter(lambda alias: _room(alias.name), node.names):
                if alias.asname is None:
                    why = f"write `from {alias.name} import ...`, or `import {alias.name} as ...`"
                    raise SyntaxError(f"{file}:{node.lineno}: {why}, which can be moved into {NAME}")
                at = starts[alias.lineno - 1] + alias.col_offset
                yield at, at, f"{NAME}.".encode()
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            at = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            text = source[at:end].decode()
            for pattern, new in IN_TEXT:
                text = pattern.sub(new, text)
            yield at, end, text.encode()


def _room(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ROOMS
