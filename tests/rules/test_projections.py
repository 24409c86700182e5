"""Projections: orthogonal, unbiased, as good as the exact one; and what they cost to find."""

import numpy as np
import pytest
import torch
from helpers.grids import covering
from helpers.matrices import decaying, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizers import linalg
from optimizers.contract import Slots
from optimizers.linalg import projections
from optimizers.random import Key

KINDS = projections.KINDS


# projections --------------------------------------------------------------------------------------------------------


def drawn(kind: str, g: Tensor, rank: int, seed: int = 0) -> Slots:
    q, ok = projections.draw(kind, g, rank, Key(seed))
    assert ok and all(x.is_contiguous() for x in q.values())
    return q


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8, 8), (40, 24), (24, 40), (7, 11), (192, 160), (2, 9, 6)])
def test_projections_are_orthogonal(kind, shape):
    g, c = randn(*shape), None
    q = drawn(kind, g, 5)
    assert {k: (v.shape, v.dtype) for k, v in q.items()} == {
        k: (v.shape, v.dtype) for k, v in projections.blank(kind, g, 5).items()
    }
    c = randn(*projections.down(g, q).shape, seed=1)
    torch.testing.assert_close(projections.down(projections.up(c, q, g), q), c, rtol=0, atol=1e-5)
    inner = (projections.down(g, q) * c).sum()
    torch.testing.assert_close(inner, (g * projections.up(c, q, g)).sum(), rtol=1e-4, atol=1e-4)
    if "basis" in q:
        eye = q["basis"].mT @ q["basis"]
        torch.testing.assert_close(eye, torch.eye(5).expand_as(eye), rtol=0, atol=1e-5)
    assert projections.down(g, q).shape[projections.compressed(kind, g)] == 5


@pytest.mark.parametrize(("kind", "shape"), covering(["random", "srht", "uniform"], [(16, 32), (40, 24), (12, 12)]))
def test_random_projections_hold_their_share_of_energy(kind, shape):
    """r / m on average, also of a matrix with all its energy in one entry."""
    spike = torch.zeros(shape)
    spike[1, 2] = 1
    for g in (randn(*shape), decaying(*shape), spike):
        shares = [(projections.down(g, drawn(kind, g, 6, s)).square().sum() / g.square().sum()) for s in range(100)]
        side = shape[0] if projections.compressed(kind, g) == -2 else shape[1]
        error = torch.stack(shares).std() / 10
        assert abs(torch.stack(shares).mean() - 6 / side) < 4 * error + 1e-6


def test_draws_depend_on_the_key_alone():
    for kind in ("random", "srht", "uniform", "range"):
        g = decaying(200, 144)
        a, b, c = (drawn(kind, g, 4, seed) for seed in (1, 1, 2))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_topk_takes_the_largest_slices(shape):
    g = randn(*shape)
    norms = (g.numpy() ** 2).sum(1 if shape[0] >= shape[1] else 0)
    assert drawn("topk", g, 3)["index"].tolist() == np.argsort(-norms)[:3].tolist(), "largest first"


@pytest.mark.parametrize("shape", [(160, 130), (130, 300), (512, 256), (3, 140, 132)])
@pytest.mark.parametrize("rank", [8, 33, 100])
def test_the_range_finder_captures_what_the_exact_basis_does(shape, rank):
    g = torch.stack([decaying(*shape[-2:], power=0.7, seed=i) for i in range(3)])[: shape[0] if len(shape) > 2 else 1]
    g = g.reshape(shape)
    exact, found = (linalg.project(g, q).square().sum() for q in (
        linalg.svd_basis(g, rank), linalg.range_basis(g, rank, Key(1))
    ))  # fmt: skip
    assert found > 0.99 * exact
    assert torch.equal(drawn("auto", g, rank)["basis"], linalg.range_basis(g, rank, Key(0))), "g is large"


def test_passes_over_g_and_its_gram_matrix_find_the_same():
    g = decaying(300, 200)
    assert torch.allclose(linalg.gram(g), g.mT @ g, atol=1e-6)
    shares = [
        (
            linalg.project(g, linalg.range_basis(g, rank, Key(1))).square().sum()
            / linalg.project(g, linalg.svd_basis(g, rank)).square().sum()
        )
        for rank in (4, 60)
    ]
    assert all(share > 0.99 for share in shares), "4 directions are found by passes, 60 in the Gram matrix"


def test_scale_does_not_matter_to_the_range_finder():
    g = decaying(200, 150)
    for scale in (1e-12, 1e8):
        q = linalg.range_basis(g * scale, 20, Key(1))
        assert torch.allclose(q.mT @ q, torch.eye(20), atol=1e-5)
        assert linalg.project(g, q).square().sum() > 0.99 * linalg.project(g, linalg.svd_basis(g, 20)).square().sum()


@given(st.integers(1, 300))
@settings(max_examples=40)
def test_the_transform_is_flat_orthogonal_and_its_own_inverse(n):
    eye = torch.eye(n)
    h = linalg.transform(eye, -1)
    torch.testing.assert_close(h @ h.mT, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(linalg.transform(h, -1), eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(linalg.transform(eye, -2), h, rtol=0, atol=1e-5)
    assert h.abs().max() < 2.001 / n**0.5
    if n & (n - 1) == 0:
        assert torch.equal(h.abs(), torch.full((n, n), 1.0).div(n**0.5)) or h.abs().sub(n**-0.5).abs().max() < 1e-6


@given(st.integers(1, 5000), st.integers(-3, 6000))
def test_the_largest_divisor(n, bound):
    assert linalg.largest_divisor(n, bound) == max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, bound))
