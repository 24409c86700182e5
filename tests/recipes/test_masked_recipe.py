"""A masked language model, from a published encoder and plain text to a checkpoint."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.glue import model, sentence
from helpers.grids import few
from helpers.runs import assert_identical, column, here, interrupted, killed, newest, refused

from engine.data.pairs import PairTokenizer
from engine.tasks.masked import MaskedTask, blank
from models.encoder_weights import load
from optimizers.contract import UsageError
from recipes.build import build
from recipes.registry import config_class, from_plain, parsed

LINE = (
    "baseline masked --init model --data train.jsonl --sequence 20 --micro-batch 4 --compile off --no-check-memory "
    "--log-every 1 --lr 3e-3"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`model`, and texts of up to 60 words; those that are held out are in a file of their own."""
    model(tmp_path / "model")
    draw = random.Random(0)
    for name, count in (("train", 40), ("held", 8)):
        rows = [" ".join(sentence(draw) for _ in range(draw.randint(1, 9))) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return tmp_path


@pytest.mark.run
def test_it_trains_on_plain_text_and_is_an_encoder_again(folder: Path) -> None:
    done = here(folder, f"{LINE} --validation held.jsonl --epochs 4 --eval-epochs 2 --eval-rows 0 --out run", ends=True)
    assert done.code == 0, done.err
    loss = column(folder / "run", "eval/loss")
    assert len(loss) == 2 and loss[-1][1] < 3.0 and column(folder / "run", "eval/accuracy")
    assert "15% of the tokens are hidden" in done.out and "hidden tokens foreseen" in done.out
    assert (folder / "run/tokenizer/tokenizer.json").is_file()
    saved = newest(folder / "run")
    assert saved.model_config["architectures"] == ["BertForMaskedLM"]
    again = from_plain(config_class(saved.trainer["config"]["recipe"]), saved.trainer["config"])
    assert (again.hidden, again.steps) == (0.15, loss[-1][0])
    done = here(folder, f"{LINE} --epochs 1 --eval-rows 1 --optimizer lisa --active 1 --period 2step --out divided")
    assert done.code == 0 and "reads 1 rows" in done.out, (
        "held out are documents of the data, where no others are named"
    )


@pytest.mark.run
@pytest.mark.parametrize("end", few(["interrupted", "killed"], "interrupted"))
def test_a_run_that_was_cut_off_ends_as_one_that_was_left_alone(folder: Path, end: str) -> None:
    """What is hidden, dropout and the order of the rows go on where they were, after Ctrl-C and after kill -9."""
    line = f"{LINE} --validation held.jsonl --eval-every 50 --save-every 2 --schedule constant --warmup 0"
    if end == "killed":
        killed(folder, f"{line} --out parts --steps 4000", "parts/step-00000004")
    else:
        interrupted(folder, f"{line} --out parts --steps 4000", 4)
    last = max(int(path.name[5:]) for path in (folder / "parts").glob("step-*")) + 5
    for flags in ("--out parts --resume auto", "--out whole"):
        done = here(folder, f"{line} {flags} --steps {last}")
        assert done.code == 0, done
    assert_identical(folder / "parts", folder / "whole")


def test_a_text_becomes_as_many_rows_as_it_needs(folder: Path) -> None:
    """No token is lost, none stands in two rows, and each row is begun and ended as a text of its own."""
    tokenizer, draw = PairTokenizer(folder / "model"), random.Random(1)
    texts = [sentence(draw), " ".join(sentence(draw) for _ in range(9)), "cat"]
    found = tokenizer.pieces(texts, 10)
    rows = [found.ids[a:b].tolist() for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
    assert all(len(row) <= 10 and (row[0], row[-1]) == (2, 3) for row in rows)
    whole = tokenizer.encode([(text,) for text in texts], np.zeros(3, np.int64), 200)
    assert found.ids[~found.special].tolist() == whole.ids[~whole.special].tolist()
    assert len(rows) == sum(-(-(size - 2) // 8) for size in np.diff(whole.starts).tolist())


def test_a_plan_has_batches_as_the_task_makes_them(folder: Path) -> None:
    tokenizer, draw = PairTokenizer(folder / "model"), random.Random(1)
    rows = tokenizer.pieces([" ".join(sentence(draw) for _ in range(9)) for _ in range(50)], 32)
    net: Any = load(folder / "model", "masked")
    task = MaskedTask(net, rows, rows, 32, mask=tokenizer.mask, config=net.config.to_hf())
    plans = blank(8, 32, 0.15)
    shapes = [{n: tuple(t.shape) for n, t in task.batch(8 * i, 8).items()} for i in range(10)]
    assert {n: tuple(t.shape) for n, t in plans.items()} in shapes
    assert {n: t.dtype for n, t in plans.items()} == {n: t.dtype for n, t in task.batch(0, 8).items()}
    config = parsed(f"baseline masked --init {folder / 'model'} --data x --sequence 32".split(), "test")
    assert all(torch.equal(a, b) for a, b in zip(config.blank(8).values(), plans.values(), strict=True))
    run = build(config, config.vocabulary(), 10)
    assert set(run.optimizer.owner) == set(run.params)


REFUSED = {
    "--init nowhere": ["--init", "nowhere", "config.json"],
    "--init model --hidden 1": ["--hidden", "got 1.0", "between 0 and 1"],
    "--init model --sequence 65": ["--sequence", "got 65", "at most 64"],
    "--init model --data none.jsonl": ["none.jsonl"],
    "--init model --data train.jsonl --field words": ["field", "words"],
    "--init model --data train.jsonl --validation train.jsonl": [
        "every document of the data is in the validation data too"
    ],
}


@pytest.mark.run
@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_fit_is_one_line(folder: Path, flags: str) -> None:
    more = "" if "--sequence" in flags else "--sequence 20"
    line = refused(here(folder, f"baseline masked {flags} {more} --compile off --out refused"), 2)
    assert all(word in line for word in REFUSED[flags]), line


def test_a_tokenizer_that_hides_nothing_is_refused(folder: Path) -> None:
    file = folder / "model/tokenizer.json"
    file.write_text(file.read_text().replace("[MASK]", "[GONE]"))
    with pytest.raises(UsageError, match=r"got none of the tokens \[MASK\], <mask>"):
        PairTokenizer(folder / "model").mask  # noqa: B018
