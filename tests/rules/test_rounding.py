"""Stochastic rounding, projections as adjoints, and draws that no default device changes."""

import pytest
import torch
from helpers.matrices import randn

from optimizers import linalg
from optimizers.apply import add
from optimizers.random import Key, normal, permutation, signs


def test_stochastic_rounding_is_right_on_average():
    p = randn(64).to(torch.bfloat16)
    delta = 0.3 * 2.0**-8 * randn(64, seed=1).abs() * p.float()  # mostly below half a unit in the last place
    draws = torch.stack([add(p, delta, torch.tensor(s, dtype=torch.int32)).double() for s in range(4000)])
    exact = (p.float() + delta).double()
    assert len(draws.unique(dim=0)) > 1
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 4000**0.5 + 1e-9).all()
    neighbours = draws.amax(0) - draws.amin(0)
    assert (neighbours <= 2.0**-7 * exact.abs()).all(), "only the two nearest values"
    assert torch.equal(add(p, 1e-3 * p.float()), p), "to nearest, the same updates are lost"


def test_stochastic_rounding_keeps_exact_and_special_values():
    p = torch.tensor([1.0, -2.5, 0.0, 3e38, float("inf"), float("nan"), 1e-40]).to(torch.bfloat16)
    for s in range(50):
        moved = add(p, torch.zeros(7), torch.tensor(s, dtype=torch.int32))
        torch.testing.assert_close(moved, p, rtol=0, atol=0, equal_nan=True)
    half = torch.tensor([0.5], dtype=torch.bfloat16)
    assert all(add(half, torch.tensor([0.25]), torch.tensor(s, dtype=torch.int32)) == 0.75 for s in range(50))
    assert torch.equal(add(randn(5), torch.ones(5), torch.tensor(1)), randn(5) + 1), "float32 is not rounded"


def test_project_and_lift_are_adjoint_and_decide_the_side():
    for shape, side in (((9, 5), -1), ((5, 9), -2), ((6, 6), -1)):
        g = randn(*shape)
        q = linalg.svd_basis(g, 3)
        assert q.shape == (min(shape), 3) and linalg.project(g, q).shape[side] == 3
        c = randn(*linalg.project(g, q).shape, seed=2)
        inner = (linalg.project(g, q) * c).sum()
        torch.testing.assert_close(inner, (g * linalg.lift(c, q, g)).sum())


@pytest.mark.parametrize(
    "draw", [lambda: normal(Key(1), (3, 2)), lambda: signs(Key(1), 9), lambda: permutation(Key(1), 9)]
)
def test_draws_are_the_same_whatever_device_is_the_default(draw):
    with torch.device("meta"):
        drawn = draw()
    assert drawn.equal(draw())
