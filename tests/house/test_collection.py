"""The tests have the same names in every process: workers that share them out refuse to begin where names differ."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_names_depend_on_neither_the_clock_nor_the_order_of_a_set() -> None:
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "tests"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        found.append([line for line in done.stdout.splitlines() if "::" in line])
        time.sleep(1)  # names that hold a time in seconds
    assert len(found[0]) > 1000
    assert [pair for pair in zip(*found, strict=True) if pair[0] != pair[1]] == []
