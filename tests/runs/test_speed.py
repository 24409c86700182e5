"""What a run says of itself: its speed without what is no training, and the last evaluation as its result."""

import json
import re
from pathlib import Path

import pytest
from helpers.runs import TINY, column, corpus, here

from engine.loop import shown


@pytest.mark.run
def test_the_speed_leaves_out_the_step_that_compiles_and_the_one_that_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    speed = shown.speed
    monkeypatch.setattr(shown, "speed", lambda task, n, seconds: rows.append(n) or speed(task, n, seconds))
    flags = f"{TINY} --steps 6 --log-every 3 --eval-every 2 --out run".replace("--no-check-memory ", "")
    done = here(corpus(tmp_path), f"baseline {flags}")
    assert done.code == 0, done.err
    assert rows == [0, 2, 2, 2, 2], "logged at 1, 2, 3, 4 and 6, of which 1 compiles and 6 is counted; 2 rows a step"
    last = column(tmp_path / "run", "eval/loss")[-1]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert last == (6, result["eval/loss"])
    told = re.findall(r"held-out (?:loss )?(\d+\.\d+)", done.out)
    assert told and set(told) == {f"{last[1]:.4f}"}, "every line of the end says the same"
