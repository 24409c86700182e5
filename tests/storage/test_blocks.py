"""Bytes with a scale for each block of values: right on average, the nearest level without draws, never zero from
above."""

import pytest
import torch
from helpers.matrices import randn
from torch import Tensor

from optimizers.rounding import draws, to_bfloat16
from optimizers.storage import blocks

SHAPES = [(), (1,), (5,), (300,), (3, 1), (4, 7), (2, 3, 33), (6, 48), (3, 257), (2, 512), (5, 688), (0, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_map = pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])


def spread(*shape: int, positive: bool, seed: int = 0) -> Tensor:
    """Values whose sizes lie over four powers of ten."""
    x = randn(*shape, seed=seed) * 10 ** (2 * randn(*shape, seed=seed + 1).clamp(-1, 1))
    return x.abs() if positive else x


def seed(i: int) -> Tensor:
    return torch.tensor(i * 7919 - 2**31, dtype=torch.int32)


@each_shape
@each_map
def test_nearest_levels_are_close_and_are_encoded_to_the_same_bytes(shape, positive):
    x = spread(*shape, positive=positive)
    q, scale = blocks.encode(x, positive)
    assert q.shape == x.shape and q.dtype == (torch.uint8 if positive else torch.int8)
    assert list(scale.shape) == blocks.scales(x.shape) and scale.dtype == torch.float32
    assert q.is_contiguous() and scale.is_contiguous()
    y = blocks.decode(q, scale)
    assert y.shape == x.shape and y.dtype == torch.float32 and ((y == 0) | (y.sign() == x.sign())).all()
    if x.numel():  # half a step of the map: (2 n + 1) / 127^2 is its step above level n, (n + 1)^4 - n^4 over 255^4
        top = float(x.abs().max())
        root = (x.abs() / top) ** (0.25 if positive else 0.5)
        step = 4 * (root + 1 / 255) ** 3 / 255 if positive else 2 * (root + 1 / 127) / 127
        assert ((y - x).abs() <= 0.51 * step * top + 1e-6 * x.abs()).all(), "scales are of parts, top of the whole"
    again, same = blocks.encode(y, positive)
    assert again.equal(q) and same.equal(scale)


@each_map
def test_the_largest_of_each_block_is_exact_and_a_block_is_a_part_of_a_row(positive):
    x = spread(4, 512, positive=positive)
    q, scale = blocks.encode(x, positive, draws(seed(3), x, 0))
    assert scale.equal(x.abs().view(4, 2, 256).amax(-1))
    top = x.abs().view(4, 2, 256).argmax(-1, keepdim=True)
    y = blocks.decode(q, scale)
    torch.testing.assert_close(y.view(4, 2, 256).gather(-1, top), x.view(4, 2, 256).gather(-1, top), rtol=1e-6, atol=0)
    assert blocks.scales(torch.Size((5, 688))) == [5, 4], "172 is the largest divisor of 688 that is at most 256"
    assert blocks.scales(torch.Size((3, 257))) == [7], "771 values in blocks of 128"


ROUNDINGS = {
    "signed": lambda x, noise: blocks.decode(*blocks.encode(x, False, noise)),
    "positive": lambda x, noise: blocks.decode(*blocks.encode(x.abs(), True, noise)) * x.sign(),
    "bfloat16": lambda x, noise: to_bfloat16(x, noise).float(),
}


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("which", [0, 3])
def test_rounding_is_unbiased(name, which):
    """Over 512 values x 1000 seeds. Errors over their standard errors: each within 5, and their sum, whose standard
    error is sqrt(512), within 4 of those: that is 0.001 of a step between levels."""
    x = spread(1, 512, positive=False).contiguous()
    x = x.sign() * x.abs().clamp(min=1e-3)  # far above the positive map's first level, to which all below is raised
    count = 1000
    found = torch.stack([ROUNDINGS[name](x, draws(seed(i), x, which)).double() for i in range(count)])
    low, high = found.amin(0), found.amax(0)
    nearest = ROUNDINGS[name](x, torch.full(x.shape, 2**15 - 1, dtype=torch.int32)).double()
    assert ((nearest == low) | (nearest == high)).all(), "only the two levels around a value"
    assert (((found == low) | (found == high)).all(0)).all()
    moves = high > low
    assert moves.float().mean() > 0.95
    p = ((x.double() - low) / (high - low)).clamp(1e-3, 1 - 1e-3)
    errors = ((found.mean(0) - x.double()) / ((high - low) * (p * (1 - p) / count).sqrt()))[moves]
    assert errors.abs().max() < 5
    assert errors.sum().abs() < 4 * len(errors) ** 0.5


def test_draws_of_two_slots_and_of_a_weight_are_independent():
    x = torch.zeros(2**16)
    drawn = [draws(seed(1), x, which).double() for which in range(4)] + [draws(seed(2), x, 0).double()]
    for i, a in enumerate(drawn):
        assert a.min() >= 0 and a.max() < 2**16 and abs(a.mean() / 2**15 - 1) < 0.02
        for b in drawn[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 2**8


def test_a_second_moment_above_zero_never_becomes_zero_and_zero_stays_zero():
    x = torch.zeros(2, 256)
    x[0, :6] = torch.tensor([1.0, 1e-9, 1e-12, 1e-20, 1e-38, 1e-45])
    x[1, :2] = torch.tensor([1e-38, 1e-40])
    for i in range(200):
        q, scale = blocks.encode(x, True, draws(seed(i), x, i))
        assert ((q > 0) == (x > 0)).all()
        y = blocks.decode(q, scale)
        assert ((y > 0) == (x > 0))[0].all() and y.isfinite().all()
    assert q[0, 2] == 1, "what lies below the first level is raised to it"


@each_map
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(positive, bad):
    x = spread(2, 512, positive=positive)
    x[0, 3] = bad
    y = blocks.decode(*blocks.encode(x, positive, draws(seed(0), x, 0)))
    assert not y[0, :256].isfinite().all() and y[0, 256:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e30, 3e38])
@each_map
def test_sizes_near_the_ends_of_float32(size, positive):
    x = torch.linspace(0 if positive else -1, 1, 256).view(1, 256) * size
    y = blocks.decode(*blocks.encode(x, positive))
    torch.testing.assert_close(y / size, x / size, rtol=0, atol=0.01)
