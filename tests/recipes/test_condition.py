"""Measuring moments: known spectra, and the recipe from end to end."""

import json

import pytest
import torch
from helpers.runs import TINY, corpus, here

from optimizers.random import normal
from optimizers.rules.muon import newton_schulz
from recipes.sumo_condition import measure, summary


def test_a_known_spectrum_is_found() -> None:
    u, v = (torch.linalg.qr(normal(key, (size, 8)))[0] for key, size in ((1, 20), (2, 8)))
    values = torch.logspace(0, -3, 8)
    full = u @ torch.diag(values) @ v.T
    slots = {"momentum_buffer": full[:, :4].contiguous(), "full_momentum": full, "energy": torch.tensor(0.25)}
    found = {sample.kind: sample for sample in measure({"w": slots, "norm": {"exp_avg": full}}, 7)}
    assert found["full"].values.float().allclose(values, rtol=1e-3) and found["full"].energy == 0.25
    assert abs(found["full"].condition / 1000 - 1) < 1e-3
    wrong = float((newton_schulz(full, 5, torch.float32) - u @ v.T).norm()) / 8**0.5
    assert abs(found["full"].error - wrong) < 1e-4 and wrong > 0.1
    assert summary(list(found.values())).row_count == 1


@pytest.mark.run
def test_the_recipe_measures_every_checkpoint(tmp_path) -> None:
    done = here(corpus(tmp_path), f"sumo condition {TINY} --rank 4 --steps 6 --every 2 --out run")
    assert done.code == 0, done.err
    assert "[least, most]" in done.out
    found = json.loads((tmp_path / "run" / "condition.json").read_text())
    assert {sample["step"] for sample in found} == {2, 4, 6}
    assert len(found) == 3 * 2 * 14, "two moments of each matrix of attention and MLP in two layers"
    projected = [sample for sample in found if sample["moment"] == "projected"]
    assert all(len(sample["singular_values"]) == 4 and 0 <= sample["energy_in_basis"] <= 1 for sample in projected)
    assert (tmp_path / "run" / "condition.png").stat().st_size > 10_000
