"""The table of all registered rules in docs/choosing.md.

python -m tests.rule_table       write it anew
"""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from optimizers.contract import Family
from optimizers.registry import RULES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "choosing.md"
BEGIN, END = "<!-- rules: begin -->\n", "<!-- rules: end -->"
WHEN_STALE = "run python -m tests.rule_table"


def first_of(family: Family[Any]) -> Family[Any]:
    """The first rule of its file."""
    return next(other for other in RULES.values() if other.file == family.file)


def about(family: Family[Any]) -> str:
    """What its file begins with: the name and the paper; of a variant, the first of its file."""
    if family is not (first := first_of(family)):
        return f"a form of {first.name}"
    return " ".join((sys.modules[family.file].__doc__ or "").partition("\n\n")[0].split())


def options(family: Family[Any]) -> str:
    """Its options with their defaults; of a variant, those in which it differs from the first of its file."""
    if family is not (first := first_of(family)):
        differs = ", ".join(f"`{name}={value!r}`" for name, value in family.preset.items())
        return f"those of {first.name}, but {differs}" if differs else f"those of {first.name}"
    default = family.default()
    return ", ".join(f"`{field.name}={getattr(default, field.name)!r}`" for field in fields(default))


def slots(family: Family[Any]) -> str:
    """What it keeps for a parameter by default: kind, and the names of the slots of that kind."""
    kinds: dict[str, list[str]] = {}
    for slot in family().slots:
        kinds.setdefault(slot.kind.value, []).append(f"`{slot.name}`")
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items()) or "nothing"


def table() -> str:
    """A row a rule, in Markdown."""
    rows = ["| `--optimizer` | what | options and their defaults | state of a parameter |", "|---|---|---|---|"]
    for family in RULES.values():
        cells = (family.name, about(family), options(family), slots(family))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """The page with the table in its place."""
    before, found, rest = text.partition(BEGIN)
    assert found and END in rest, f"{PAGE.name} lacks {BEGIN.strip()} or {END}"
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
