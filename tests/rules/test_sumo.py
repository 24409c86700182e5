"""SUMO: a float64 replay of every profile, what its algorithm promises, options, bytes of whole models."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.grids import covering
from helpers.matrices import decaying, hyper, randn, run
from reference.sumo import Sumo, first_delta
from torch import Tensor

from models.llama import PRESETS, Llama
from optimizers import linalg
from optimizers.apply import add
from optimizers.contract import Rule, Slots, UsageError, state_bytes
from optimizers.linalg.polar import newton_schulz, polar
from optimizers.random import Key, normal
from optimizers.rules.sumo import sumo, sumo_paper, sumo_release

RANK, GAP = 3, 7
SHAPES = [(12, 8), (8, 12), (9, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


def update_of(rule: Rule, g: Tensor, slots: Slots, lr: float = 1.0) -> Tensor:
    """U of a step at rate `lr`, which is -delta."""
    return -rule.update(g, slots, torch.zeros_like(g), hyper(lr))[0]


def value(q: Tensor) -> np.ndarray:
    return q.double().numpy()


RELEASE = dict(nesterov="release", moments="keep", limiter=1.1, alpha=4.0, decay="after")
REPLAYS: dict[str, tuple] = {
    "recommended": (sumo, {}, {}),
    "paper": (sumo_paper, {}, dict(nesterov="none", limiter=1.1, alpha=1.0)),
    "release": (sumo_release, {}, RELEASE),
    "paper, the printed side": (sumo_paper, dict(side="longer"), dict(nesterov="none", limiter=1.1, alpha=1.0)),
    "release, the printed side": (sumo_release, dict(side="longer"), RELEASE),
    **{f"moments {m}": (sumo, dict(moments=m), dict(moments=m)) for m in ("keep", "reset")},
    "tight limiter": (sumo, dict(limiter=0.97), dict(limiter=0.97)),
    "no perpendicular term": (sumo, dict(rho=0.0), dict(rho=0.0)),
    "normalized": (sumo, dict(perpendicular="normalized", rho=0.3), dict(perpendicular="normalized", rho=0.3)),
    "normalized, longer": (
        sumo,
        dict(perpendicular="normalized", side="longer", basis="track"),
        dict(perpendicular="normalized"),
    ),
    "tracked": (sumo, dict(basis="track"), {}),
    "leading directions": (sumo, dict(basis="range"), {}),
    "longer side": (sumo, dict(side="longer"), {}),
    **{f"by {m}": (sumo, dict(orthogonalize=m), {}) for m in ("svd", "lq", "polar_express")},
}


@pytest.mark.parametrize(("case", "shape"), covering(REPLAYS, SHAPES))
def test_a_replay_in_float64(case, shape):
    make, options, theirs = REPLAYS[case]
    rule, p, lr, wd = make(RANK, GAP, **options), 0.1 * randn(*shape), 0.01, 0.1
    other = options.get("side") == "longer"
    turned = (shape[0] >= shape[1]) != other
    upright = (lambda x: value(x).T) if turned else value
    basis = options.get("basis", "random" if make is sumo else "range")
    slots, replay, q = rule.init(p), Sumo(upright(p), RANK, **theirs), None
    for t in range(30):
        g = decaying(*shape, seed=100 + t)
        if t % GAP == 0:
            slots, ok = rule.refresh(g, slots, Key(t))
            old, q = q, value(slots["basis"])
            assert ok and q.shape == (upright(p).shape[0], RANK)
            np.testing.assert_allclose(q.T @ q, np.eye(RANK), atol=1e-6)
            u = np.linalg.svd(upright(g))[0][:, :RANK]
            y = value(normal(Key(t), q.shape))
            if basis == "track":
                u = np.linalg.qr(upright(g) @ upright(g).T @ (y if old is None else old))[0]
            elif basis == "random":
                u = np.linalg.qr(y if old is None else y - (1 - 1e-4) * old @ old.T @ y)[0]
            exact = basis != "range" or make is sumo_release
            np.testing.assert_allclose(q @ q.T, u @ u.T, atol=1e-4 if exact else 0.05)
        replay.step(upright(g), q, lr, wd)
        delta, slots = rule.update(g, slots, p, hyper(lr, wd))
        p = add(p, delta)
        np.testing.assert_allclose(upright(p), replay.w, rtol=0, atol=1e-6, err_msg=f"step {t}")


@each_shape
def test_the_first_step_by_hand(shape):
    """A fresh moment is parallel to Ĝ, whose factor maps the leading directions of one side on those of the other."""
    g, p = decaying(*shape, seed=3), randn(*shape)
    rule = sumo(RANK, basis="svd", alpha=1.0)
    slots, _ = rule.refresh(g, rule.init(p), Key(0))
    delta, _ = rule.update(g, slots, p, hyper(0.1, 0.5))
    expected = first_delta(value(g), value(p), RANK, 0.1, 0.5)
    np.testing.assert_allclose(value(delta), expected, rtol=0, atol=3e-7)


# what the algorithm promises ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sumo, sumo_paper, sumo_release, partial(sumo, side="longer", basis="track")])
def test_transposed_is_transposed(make):
    rule = make(RANK, GAP)
    a, b = randn(12, 8), randn(12, 8).T
    one, two = rule.init(a), rule.init(b)
    for t in range(10):
        g = decaying(12, 8, seed=t)
        if t % GAP == 0:
            one, two = rule.refresh(g, one, Key(t))[0], rule.refresh(g.T, two, Key(t))[0]
        (da, one), (db, two) = (rule.update(x, s, p, hyper(0.1)) for x, s, p in ((g, one, a), (g.T, two, b)))
        a, b = add(a, da), add(b, db)
        torch.testing.assert_close(a, b.T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [sumo, sumo_paper, partial(sumo_release, alpha=1.0)])
@each_shape
def test_inside_the_subspace_all_singular_values_are_s(make, shape):
    rule = make(RANK, GAP, rho=0.0)
    _, slots = run(rule, randn(*shape), 9)
    alpha = np.sqrt(min(shape) / RANK) if make is sumo else 1.0
    u = update_of(rule, decaying(*shape, seed=1), slots) / alpha
    s, values = 0.2 * max(shape) ** 0.5, torch.linalg.svdvals(u.double())
    torch.testing.assert_close(values[:RANK], torch.full((RANK,), s).double(), rtol=1e-6, atol=0)
    assert float(values[RANK]) < 5e-7 * s
    rms = 0.2 * (RANK / min(shape)) ** 0.5
    assert float((u * alpha).square().mean().sqrt()) == pytest.approx(rms * alpha, rel=1e-6)
    if make is sumo:
        assert rms * alpha == pytest.approx(0.2), "that of a full-rank update"


@each_shape
@pytest.mark.parametrize("side", ["shorter", "longer"])
def test_outside_the_subspace_is_plain_gradient_descent(shape, side):
    rule = sumo(RANK, alpha=1.0, rho=0.7, side=side)
    g, (_, slots) = decaying(*shape, seed=1), run(sumo(RANK, side=side), randn(*shape), 3)
    q, other = slots["basis"], side == "longer"
    outside = g - linalg.lift(linalg.project(g, q, other), q, g, other)
    u = update_of(rule, g, slots)
    got = u - linalg.lift(linalg.project(u, q, other), q, g, other)
    torch.testing.assert_close(got, 0.7 * outside, rtol=0, atol=1e-6)


@each_shape
@pytest.mark.parametrize("side", ["shorter", "longer"])
def test_outside_the_subspace_muon_may_move_it(shape, side):
    """`perpendicular="orthogonal"`: inside as ever, outside s rho times the factor of what is there now."""
    plain, rule = (
        sumo(RANK, alpha=1.0, rho=rho, side=side, perpendicular=p) for p, rho in (("raw", 0), ("orthogonal", 0.7))
    )
    g, (_, slots) = decaying(*shape, seed=1), run(plain, randn(*shape), 3)
    q, other = slots["basis"], side == "longer"
    outside = g - linalg.lift(linalg.project(g, q, other), q, g, other)
    s = 0.2 * max(shape) ** 0.5
    expected = update_of(plain, g, slots) + 0.7 * s * newton_schulz(outside).float()
    torch.testing.assert_close(update_of(rule, g, slots), expected, rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(update_of(rule, g, slots) / s)
    assert values[0] < 1.3 and values[min(shape) - 1] > 0.1, "no direction stands still"


@each_shape
def test_transfer_keeps_the_moment_where_the_span_stays(shape):
    """Other directions of the same span: QM, and the next step, are what they were."""
    rule = sumo(RANK, GAP, basis="svd")
    _, slots = run(rule, randn(*shape), 5)
    weights = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(1))
    turned = slots["basis"] @ torch.linalg.qr(weights)[0]
    g = linalg.lift(linalg.project(decaying(*shape, seed=9), turned), turned, randn(*shape))  # its span is this one
    new, ok = rule.refresh(g, slots, Key(1))
    assert ok and not torch.allclose(new["basis"], slots["basis"], atol=0.1)
    before, after = (linalg.lift(s["momentum_buffer"], s["basis"], g) for s in (slots, new))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.norm()))
    torch.testing.assert_close(update_of(rule, g, new), update_of(rule, g, slots), rtol=0, atol=2e-6)
    stale, _ = sumo(RANK, GAP, basis="svd", moments="keep").refresh(g, slots, Key(1))
    assert torch.equal(stale["momentum_buffer"], slots["momentum_buffer"])
    cleared, _ = sumo(RANK, GAP, basis="svd", moments="reset").refresh(g, slots, Key(1))
    assert not cleared["momentum_buffer"].any()


@each_shape
def test_the_limiter_does_nothing_to_exact_factors_and_works_on_others(shape):
    p = randn(*shape)
    free, limited = (run(sumo(RANK, GAP, limiter=limiter), p, 20)[0] for limiter in (None, 1.0001))
    assert torch.equal(free, limited)
    rule = sumo(RANK, GAP, limiter=0.5, rho=0.0)
    sizes = [float((run(rule, p, t + 1)[0] - run(rule, p, t)[0]).norm()) for t in range(4)]
    assert [b / a for a, b in pairwise(sizes)] == pytest.approx([0.5] * 3, rel=1e-3)


def test_a_heavy_ball_is_an_average():
    """Their moments differ by a factor, which the polar factor does not see."""
    rule, p = sumo(RANK, nesterov="none", rho=0.0, alpha=1.0), torch.zeros(12, 8)
    slots, average = rule.refresh(decaying(12, 8), rule.init(p), Key(0))[0], torch.zeros(12, RANK)
    for t in range(20):
        g = decaying(12, 8, seed=t)
        delta, slots = rule.update(g, slots, p, hyper(1.0))
        average = 0.95 * average + 0.05 * (g @ slots["basis"])
        expected = 0.2 * 12**0.5 * polar(average) @ slots["basis"].T
        torch.testing.assert_close(-delta, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [sumo, sumo_paper, sumo_release, partial(sumo, perpendicular="normalized")])
@each_shape
def test_without_a_gradient_nothing_moves(make, shape):
    rule, p = make(RANK, GAP), randn(*shape)
    slots, moved, zero = rule.init(p), p, torch.zeros(shape)
    for t in range(3):
        slots, ok = rule.refresh(zero, slots, Key(t))
        delta, slots = rule.update(zero, slots, moved, hyper(0.1))
        moved = add(moved, delta)
        assert not ok
    assert torch.equal(moved, p)


# memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["60m", "130m", "350m", "1b", "7b"])
def test_bytes_of_whole_models(model):
    with torch.device("meta"):
        shapes = [p.shape for n, p in Llama(PRESETS[model]).named_parameters() if "_proj" in n]
    assert shapes
    for rank in (128, 256):
        for extra, options in ((0, {}), (4, dict(limiter=1.1)), (0, dict(side="longer", basis="track"))):
            rule = sumo(rank, **options)
            for shape in set(shapes):
                slots = rule.init(torch.empty(shape, device="meta", dtype=torch.bfloat16))
                assert state_bytes(slots) == 4 * sum(shape) * rank + extra


# what others see ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"), covering([sumo, sumo_paper, sumo_release, partial(sumo, side="longer")], SHAPES)
)
def test_moments_are_said_and_taken_over(make, shape):
    """The export of a constant gradient's moment is that gradient; what is adopted says it again."""
    rule, g = make(RANK, GAP), randn(shape[0], RANK) @ randn(RANK, shape[1], seed=1)
    slots = rule.refresh(g, rule.init(g), Key(0))[0]
    q, other = slots["basis"], rule.init(g)["basis"].shape[0] != min(shape)
    g = linalg.lift(linalg.project(g, q, other), q, g, other)  # what a random basis sees of it
    for _ in range(300):
        _, slots = rule.update(g, slots, g, hyper(0.1))
    moments = rule.export(slots, g)
    torch.testing.assert_close(moments.first, g, rtol=1e-3, atol=1e-3)
    taken, did = rule.adopt(moments, rule.init(g), g, Key(1))
    assert did == "projected" and {k: v.shape for k, v in taken.items()} == {k: v.shape for k, v in slots.items()}
    torch.testing.assert_close(rule.export(taken, g).first, g, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sumo(nesterov="on"), r"sumo: nesterov must be one of .*'correct'.* got 'on'"),
        (lambda: sumo(basis="exact"), "basis must be .* got 'exact'"),
        (lambda: sumo(moments="drop"), "moments must be .* got 'drop'"),
        (lambda: sumo(side="left"), "side must be .* got 'left'"),
        (lambda: sumo(perpendicular="none"), "perpendicular must be .* got 'none'"),
        (lambda: sumo_paper(orthogonalize="qr"), "sumo_paper: orthogonalize must be .* got 'qr'"),
        (lambda: sumo(alpha="auto"), "alpha must be .* got 'auto'"),
        (lambda: sumo(update_proj_gap=0), "update_proj_gap must be at least 1, got 0"),
        (lambda: sumo_release(momentum=1.0), r"sumo_release: momentum must lie in \[0, 1\), got 1.0"),
        (lambda: sumo(9).init(torch.zeros(8, 20)), r"rank must lie in \[1, 8\] .* got 9"),
        (lambda: sumo(1).init(torch.zeros(8)), "needs a matrix"),
    ],
)
def test_what_cannot_be_done_is_named(make, named):
    with pytest.raises(UsageError, match=named):
        make()
