"""MAWPS (Koncel-Kedziorski et al., NAACL 2016, aclanthology.org/N16-1136): a word problem, its equation, its number.

Rows are those of its authors' JSON (github.com/sroy9/mawps), `sQuestion`, `lEquations`, `lSolutions`, or those of
mwpt5/MAWPS on Hugging Face, in parquet: `Question`, with N_00, N_01 ... for its `Numbers`, `Equation`, `Answer`.

How a row becomes a prompt and an answer is ours: the equation, then the number behind "####", as in GSM8K.
"""

import re
from collections.abc import Mapping
from typing import Any

from .masks import Fault

AUTHORS = ("sQuestion", "lEquations", "lSolutions")
PARQUET = ("Question", "Numbers", "Equation", "Answer")
_PLACE = re.compile(r"N_(\d+)")


def is_mawps(row: Mapping[str, Any]) -> bool:
    """Do the keys say MAWPS, in one of its two forms?"""
    return any(set(keys) <= row.keys() for keys in (AUTHORS, PARQUET))


def pair(row: Mapping[str, Any]) -> tuple[str, str]:
    """What is asked, and what is to be answered. Raises Fault."""
    if set(AUTHORS) <= row.keys():
        question, equation, number = row["sQuestion"], _one(row, "lEquations"), _one(row, "lSolutions")
    else:
        numbers = [_plain(word, "Numbers") for word in str(row["Numbers"]).split()]
        question, equation = (_filled(row, name, numbers) for name in ("Question", "Equation"))
        number = row["Answer"]
    if not isinstance(question, str) or not question.strip():
        raise Fault(f"{'sQuestion' if 'sQuestion' in row else 'Question'}: got {str(question)[:60]!r}; expected a text")
    if not isinstance(equation, str) or not equation.strip():
        raise Fault(f"the equation: got {str(equation)[:60]!r}; expected a text such as X=(70.0-27.0)")
    return question.strip(), f"{equation.strip()}\n#### {_plain(number, 'the solution')}"


def _one(row: Mapping[str, Any], name: str) -> Any:
    """The only entry of a list. A problem of several equations has no one number."""
    value = row[name]
    if not isinstance(value, list | tuple) or len(value) != 1:
        raise Fault(f"{name}: got {str(value)[:60]}; expected a list of one; leave such rows out (--allow-malformed)")
    return value[0]


def _filled(row: Mapping[str, Any], name: str, numbers: list[str]) -> str:
    """A text with its numbers in their places."""
    text = row[name]
    if not isinstance(text, str):
        raise Fault(f"{name}: got {str(text)[:60]!r}; expected a text")
    if odd := [place for place in _PLACE.findall(text) if int(place) >= len(numbers)]:
        raise Fault(f"{name}: got N_{odd[0]} where Numbers has {len(numbers)}; repair or remove the row")
    return _PLACE.sub(lambda place: numbers[int(place[1])], text)


def _plain(value: Any, name: str) -> str:
    """A number as it is written by hand: 43, not 43.0. Raises Fault."""
    try:
        number = float(value)
        return str(int(number)) if number.is_integer() else str(number)
    except (TypeError, ValueError, OverflowError):
        raise Fault(f"{name}: got {str(value)[:60]!r}; expected a number") from None
