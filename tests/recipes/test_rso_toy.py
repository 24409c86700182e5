"""The theory of RSO on problems small enough to solve; its toys and its presets."""

import pytest
import torch
from helpers.subspace import KINDS

from optimizers.contract import UsageError
from recipes.rso import PRESETS as RECIPES
from recipes.rso import Rso
from recipes.rso_toy import Counterexample, Toy, least_squares, picture, toy

slow = pytest.mark.slow


# Theory, toys, recipe.


@pytest.mark.run
def test_the_bound_holds_on_least_squares():
    for seed in range(3):
        bound, means = least_squares(seed)
        for kind in KINDS:
            tight, weak, none = (float(means[f"{kind}/{strength}"]) for strength in ("1", "0.1", "0"))
            assert none < weak < tight < bound, "the penalty is for the proof: without it the descent is faster"
            assert tight > bound / 20, "a bound that says something"


@pytest.mark.run
def test_galore_gets_stuck_where_rso_does_not():
    """Early on: GaLore's gradient has stopped shrinking while that of RSO is on its way to its noise floor."""
    problem = Counterexample(0)
    ends = {method: problem.run(method, 3000) for method in ("GaLore, SGD", "RSO coordinate")}
    assert ends["GaLore, SGD"][-1] > 1 and ends["GaLore, SGD"][-1] == pytest.approx(ends["GaLore, SGD"][-6], rel=1e-3)
    assert ends["RSO coordinate"][-1] < 1e-6


@slow
@pytest.mark.parametrize("seed", range(2))
def test_the_counterexample_to_its_end(seed):
    problem = Counterexample(seed)
    ends = {}
    for method in ("SGD", "GaLore, SGD", "GaLore, Adam", "RSO haar", "RSO gaussian", "RSO coordinate"):
        norms = problem.run(method, 20_000)
        ends[method] = sum(norms[-20:]) / 20
    assert ends["SGD"] < 1e-8 and ends["GaLore, SGD"] > 0.5 and ends["GaLore, Adam"] > 0.5
    assert all(ends[f"RSO {kind}"] < 0.1 for kind in KINDS), ends


@pytest.mark.run
def test_the_toy_prints_its_tables_and_draws(tmp_path, capsys):
    toy(Toy(steps=300, out=tmp_path))
    said = capsys.readouterr().out
    for text in ("bound at 2 Lhat", "haar", "GaLore, Adam", "RSO coordinate", "counterexample.png"):
        assert text in said
    assert (tmp_path / "counterexample.png").read_bytes().startswith(b"\x89PNG")
    picture(tmp_path / "zero.png", {"a": [1.0, 0.1, 0.0], "b": [2.0, 2.0, 2.0]}, 10)
    with pytest.raises(UsageError, match="--steps must be at least 100"):
        toy(Toy(steps=5, out=tmp_path))


def test_presets_have_galores_ranks_and_periods():
    got = {name: (c.rank, c.period) for name, (_, c) in RECIPES.items() if type(c) is Rso and name != "demo"}
    assert got == {"60m": (128, 200), "130m": (256, 200), "350m": (256, 200), "1b": (512, 200), "7b": (1024, 500)}
    shapes = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.mlp.up_proj.weight": (4, 4),
        "model.norm.weight": (4,),
    }
    params = {name: torch.empty(shape) for name, shape in shapes.items()}
    for _, config in RECIPES.values():
        if type(config) is Rso:
            config.check()
            assert {group.name for group in config.groups(params)} == {"rso", "adamw-norms", "adamw-rest"}
