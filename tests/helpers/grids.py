"""Grids of cases of which the fast tests keep a few, so that every value of every axis is among them."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest


def few(cases: Collection[Any], *fast: Any) -> list[Any]:
    """The cases, all of them slow but those that are named."""
    assert fast and all(case in cases for case in fast), f"got {fast}, expected some of {list(cases)}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def covering(*axes: Collection[Any]) -> list[Any]:
    """Every combination of the axes' values; slow, but for as many as show each value of each axis.

    Give these to one `parametrize` that names all the axes. A value that is added to an axis is among the fast ones. Of
    two longest axes the first values go together, the second ones, and so on.
    """
    values: list[Sequence[Any]] = [list(axis) for axis in axes]
    fast = [
        tuple(axis[(i + k * (i // len(axis))) % len(axis)] for k, axis in enumerate(values))
        for i in range(max(map(len, values)))
    ]
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in product(*values)]
