"""Refreshes of SUMO: each basis finds, follows or avoids what it should; stacks move as their matrices do."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.matrices import decaying, hyper, randn, run

from engine.memory import counted_peak
from optimizers import linalg
from optimizers.apply import add, refresh, update
from optimizers.compile import compiled
from optimizers.contract import Group
from optimizers.kernel import make_kernel
from optimizers.partition import partition
from optimizers.random import Key, normal
from optimizers.rules.sumo import sumo, sumo_release

RANK, GAP = 3, 7
SHAPES = [(12, 8), (8, 12), (9, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES)


# refreshes ------------------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("side", ["shorter", "longer"])
def test_a_random_sketch_finds_the_leading_directions(shape, side):
    g, other = decaying(*shape, seed=4), side == "longer"
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    columns = linalg.tall(g) != other
    best = vh[:RANK].T if columns else u[:, :RANK]
    held = {}
    for basis in ("range", "svd"):
        slots, _ = (rule := sumo(RANK, basis=basis, side=side)).refresh(g, rule.init(g), Key(0))
        q = slots["basis"]
        held[basis] = float(linalg.project(g, q, other).square().sum() / s[:RANK].square().sum())
        if basis == "svd":
            torch.testing.assert_close(q @ q.T, best @ best.T, rtol=0, atol=1e-5)
    assert held["svd"] == pytest.approx(1, abs=1e-5) and 0.999 < held["range"] <= 1.00001


@each_shape
@pytest.mark.parametrize("side", ["shorter", "longer"])
def test_tracking_follows_a_gradient(shape, side):
    """Multiplied by G G^T again and again the basis reaches G's leading directions, with a moment from the start."""
    rule, old, new = sumo(RANK, basis="track", side=side), decaying(*shape, seed=1), decaying(*shape, seed=2)
    other = side == "longer"
    slots, _ = rule.refresh(old, rule.init(old), Key(0))
    x = old if linalg.tall(old) != other else old.mT
    start = normal(Key(0), tuple(slots["basis"].shape))
    assert torch.equal(slots["basis"], torch.linalg.qr(x.mT @ (x @ start))[0]), "nothing to start from: at random"
    _, slots = rule.update(old, slots, old, hyper(0.1))
    held = [float(linalg.project(new, slots["basis"], other).norm())]
    for t in range(40):
        slots, ok = rule.refresh(new, slots, Key(t))
        held.append(float(linalg.project(new, slots["basis"], other).norm()))
        assert ok
    best = float(torch.linalg.svdvals(new)[:RANK].norm())
    assert all(b >= a - 1e-5 for a, b in pairwise(held)) and held[1] > 1.1 * held[0]
    assert held[-1] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("rank", [3, 4, 6, 8])
def test_random_directions_are_new_as_long_as_there_are_new_ones(rank):
    """Of 8, what two bases must share they share, and no more; each matrix of a stack stays away from its own."""
    rule, p = sumo(rank, basis="random"), randn(2, 12, 8)
    slots, _ = rule.refresh(randn(2, 12, 8, seed=1), rule.init(p), Key(0))
    assert torch.equal(slots["basis"][0], slots["basis"][1]), "no moment yet: nothing to stay away from"
    _, slots = rule.update(randn(2, 12, 8, seed=1), slots, p, hyper(0.1))
    new, ok = rule.refresh(randn(2, 12, 8, seed=2), slots, Key(1))
    q, shared = new["basis"], (slots["basis"].mT @ new["basis"]).square().sum((-2, -1))
    assert ok and torch.allclose(q.mT @ q, torch.eye(rank).expand(2, rank, rank), atol=1e-5)
    assert torch.allclose(shared, torch.full((2,), float(max(0, 2 * rank - 8))), atol=1e-3)
    again, _ = rule.refresh(randn(2, 12, 8, seed=3), slots, Key(1))
    assert torch.equal(again["basis"], q), "whatever the gradient"


def test_a_basis_is_rebuilt_when_it_sees_too_little():
    rule, p = sumo(RANK, 200, basis="range", refresh_below=0.5), randn(12, 8)
    assert rule.gap == 1, "asked at every step"
    optimizer = partition({"w": p}, [Group("sumo", rule, ("",), 0.01)])
    state, bases = optimizer.init({"w": p}), []
    q = torch.linalg.qr(randn(8, 8, seed=5))[0]
    first, second = randn(12, 4) @ q[:, :4].T, randn(12, 4, seed=1) @ q[:, 4:].T  # of orthogonal row spaces
    for t, g in enumerate([0.01 * first, first, first, second, second]):
        state, (ok,) = refresh(optimizer, {"w": g}, state, t, Key(0))
        assert ok
        bases.append(state["w"]["basis"])
        _, state = update(optimizer, {"w": g}, state, {"w": p}, {"sumo": hyper(0.1)})
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed == [False, False, True, False]
    below, _ = rule.refresh(0.1 * second / second.norm(), state["w"], Key(9))
    assert not torch.equal(below["basis"], bases[-1]), "small enough"
    assert all(below[k].is_contiguous() for k in below)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("basis", ["range", "svd", "track", "random"])
def test_a_gradient_that_is_not_finite_poisons_nothing(bad, basis):
    rule, p = sumo(RANK, GAP, basis=basis, limiter=1.1), randn(12, 8)
    p, slots = run(rule, p, 5)
    g = randn(12, 8)
    g[3, 4] = bad
    kept, ok = rule.refresh(g, slots, Key(0))
    assert not ok and all(torch.equal(kept[k], slots[k]) for k in slots)
    delta, new = rule.update(g, slots, p, hyper(0.1))
    assert delta.isfinite().all() and all(v.isfinite().all() for v in new.values())
    as_zero, _ = rule.update(torch.zeros(12, 8), slots, p, hyper(0.1))
    assert torch.equal(delta, as_zero)


# stacks of matrices ---------------------------------------------------------------------------------------------------


STACKS = {
    "sumo": sumo(RANK, GAP),
    "track": sumo(RANK, GAP, basis="track", side="longer", perpendicular="normalized"),
    "release": sumo_release(RANK, GAP),
    "random": sumo(RANK, GAP, basis="random"),
    "below": sumo(RANK, refresh_below=0.9),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_experts_move_as_if_each_were_alone(name, shape):
    """One without tokens and one with a gradient that is not finite among them."""
    rule = STACKS[name]
    p = randn(4, *shape)
    slots = rule.init(p)
    alone = [(q, rule.init(q)) for q in p]
    for t in range(9):
        g = torch.stack([decaying(*shape, seed=10 * t + i) for i in range(4)])
        g[1] = 0
        if t == 7:
            g[2, 0, 0] = torch.nan
        if t % rule.gap == 0:
            slots, ok = rule.refresh(g, slots, Key(t))
            assert bool(ok) == (t != 7)
        delta, slots = rule.update(g, slots, p, hyper(0.1))
        p = add(p, delta)
        for i, (q, s) in enumerate(alone):
            if t % rule.gap == 0:
                s, _ = rule.refresh(g[i], s, Key(t))
            delta, s = rule.update(g[i], s, q, hyper(0.1))
            alone[i] = add(q, delta), s
    for i, (q, s) in enumerate(alone):
        torch.testing.assert_close(p[i], q, rtol=0, atol=2e-5)
        torch.testing.assert_close(slots["momentum_buffer"][i], s["momentum_buffer"], rtol=0, atol=2e-5)
    assert torch.equal(p[1], randn(4, *shape)[1]), "no gradient, no step"


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_equals_eager_and_holds_one_tensor_of_full_size():
    """Stacks, as the property table compares matrices; and of full size the lifted update alone, the rest is fused."""
    rules = [STACKS["track"], STACKS["release"], sumo(8), sumo(8)]
    grads = [decaying(*shape) for shape in ((2, 12, 8), (2, 8, 12), (512, 256), (256, 512))]
    results = []
    for make in (compiled, lambda kernel: kernel):
        params = [g.to(torch.bfloat16) if i == 1 else g.clone() for i, g in enumerate(grads)]
        slots, kernel = [r.init(p) for r, p in zip(rules, params, strict=True)], make(make_kernel(rules))
        call = partial(kernel, grads, slots, params, [hyper(0.1)] * 4, torch.tensor(1.0), None)
        for t in range(2):
            for i, rule in enumerate(rules):
                slots[i] |= rule.refresh(grads[i], slots[i], Key(t))[0]
            call()
        results.append((params, slots, call))
    for p, slots, q, expected in zip(*results[0][:2], *results[1][:2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        for slot in slots:
            torch.testing.assert_close(slots[slot], expected[slot], rtol=1e-5, atol=1e-5)
    assert counted_peak(results[0][2]) < 1.5 * grads[2].numel() * 4 < counted_peak(results[1][2])
