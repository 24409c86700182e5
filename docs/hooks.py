"""What `make docs` adds to the pages in this folder: the README as the first page, and a page a module from docstrings.

Nothing lists the modules: a new file appears by itself.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("optimizers", "engine", "models", "recipes", "tools")


def modules() -> list[str]:
    """Every public module, by its full name, packages before what is in them."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in files if "__pycache__" not in file.parts]
    names = [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


def on_config(config: Any) -> Any:
    """List the generated pages in the menu, a group per package."""
    config.nav.append({"Every file in a line": "api/index.md"})
    for package in PACKAGES:
        own = [name for name in modules() if name.partition(".")[0] == package]
        config.nav.append({package: [{name: f"api/{name}.md"} for name in own]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Generate the pages that are not in the folder."""
    files.append(File.generated(config, "index.md", content=front_page()))
    files.append(File.generated(config, "api/index.md", content=overview()))
    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))
    return files


def overview() -> str:
    """Every module with what its docstring says first."""
    lines = ["# Every file in a line"]
    for name in modules():
        base = ROOT.joinpath(*name.split("."))
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        first = " ".join(said.split("\n\n")[0].split()).replace("|", "/")
        if "." not in name:
            lines += ["", f"## {name}", "", "| | |", "|---|---|"]
        lines.append(f"| [`{name}`]({name}.md) | {first} |")
    return "\n".join(lines) + "\n"


def front_page() -> str:
    """The README with its links as they are from here. What is not part of the site is named, not linked."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/results\)", "](results/README.md)", text)
    text = re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)]*?)\)", _linked, text)


def _linked(match: re.Match[str]) -> str:
    target = match[2].partition("#")[0]
    return match[0] if (ROOT / "docs" / target).is_file() else match[1]
