"""Refreshes of SNSM: what a useless gradient and a new basis do to the momentum; compiled kernels."""

from functools import partial

import pytest
import torch
from helpers.grids import covering
from helpers.matrices import decaying, hyper, randn

from engine.memory import counted_peak
from optimizers.compile import compiled
from optimizers.kernel import make_kernel
from optimizers.linalg import projections
from optimizers.random import Key
from optimizers.rules.snsm import (
    adam_snsm,
    snsm,
)

KINDS = projections.KINDS


# refresh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "bad"),
    covering(KINDS, [(9, 6), (6, 9), (150, 140)], [float("nan"), float("inf"), -float("inf"), 0.0]),
)
def test_a_useless_gradient_changes_nothing_at_a_refresh(kind, shape, bad):
    for moments, compat in (("reset", ""), ("rotate", ""), ("keep", ""), ("reset", "sn-sm")):
        rule = snsm(3, proj_type=kind, moments=moments, compat=compat)
        p, g = randn(*shape), decaying(*shape)
        slots, _ = rule.refresh(g, rule.init(p), Key(1))
        _, slots = rule.update(g, slots, p, hyper(0.1))
        poisoned = g.clone()
        poisoned[2, 3] = bad
        kept, ok = rule.refresh(poisoned if bad else torch.zeros_like(g), slots, Key(2))
        assert not ok
        assert all(torch.equal(kept[k], slots[k]) for k in slots) and kept.keys() == slots.keys()
        after, ok = rule.refresh(g, kept, Key(3))
        assert ok and all(v.isfinite().all() for v in after.values())


def test_a_refresh_clears_keeps_or_carries_the_momentum():
    g, h = decaying(9, 6, seed=1), decaying(9, 6, seed=2)
    after = {}
    for moments, compat in (("reset", ""), ("keep", ""), ("rotate", ""), ("reset", "sn-sm")):
        rule = snsm(3, proj_type="svd", moments=moments, compat=compat)
        slots, _ = rule.refresh(g, rule.init(g), Key(1))
        _, before = rule.update(g, slots, g, hyper(0.1))
        after[moments + compat], _ = rule.refresh(h, before, Key(2))
    assert not after["reset"]["exp_avg"].any()
    assert torch.equal(after["keep"]["exp_avg"], before["exp_avg"])
    r = after["rotate"]["basis"].mT @ before["basis"]
    torch.testing.assert_close(after["rotate"]["exp_avg"], before["exp_avg"] @ r.mT)
    stale = after["resetsn-sm"]
    assert torch.equal(stale["exp_avg"], before["exp_avg"]), "used once more"
    _, used = rule.update(h, stale, g, hyper(0.1))
    assert not used["exp_avg"].any()
    _, used = rule.update(h, used, g, hyper(0.1))
    assert used["exp_avg"].any()


# compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_kernels_do_as_eager_ones():
    """One graph with every kind of projection, subsets that straddle rows, and the first release's refresh."""
    cases = [(snsm(4, proj_type=kind), (12, 16)) for kind in ("svd", "topk", "srht")]
    cases += [(snsm(4, proj_type="uniform", subset=-2), (18, 16)), (adam_snsm(4, compat="sn-sm"), (18, 16))]
    cases += [(snsm(4, proj_type="srht", correct_complement=False), (18, 12)), (snsm(2, proj_type="topk"), (2, 9, 6))]
    rules = [rule for rule, _ in cases]
    results = []
    for make in (compiled, lambda kernel: kernel):
        kernel = make(make_kernel(rules))
        params = [
            randn(*shape, seed=i).to(torch.bfloat16 if i == 1 else torch.float32) for i, (_, shape) in enumerate(cases)
        ]
        slots = [rule.init(p) for rule, p in zip(rules, params, strict=True)]
        for t in range(3):
            grads = [randn(*p.shape, seed=10 * t + i) for i, p in enumerate(params)]
            if t != 1:
                for i, rule in enumerate(rules):
                    for k, v in rule.refresh(grads[i], slots[i], Key(t))[0].items():
                        slots[i][k] = v
            kernel(grads, slots, params, [hyper(0.01 / (1 + t), 0.1)] * len(rules), torch.tensor(1.0), None)
        results.append((params, slots))
    for (rule, shape), a, b, s, r in zip(cases, *(x for pair in zip(*results, strict=True) for x in pair), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=(rule.name, shape): f"{n}: {m}")
        for k in s:
            torch.testing.assert_close(s[k], r[k], rtol=1e-5, atol=1e-6)


@pytest.mark.compiles
def test_slices_need_no_buffer_of_full_size():
    """Rows and columns alike: not the zero-filled scatters of the authors' code."""
    rule = snsm(8, proj_type="topk")
    params = [randn(512, 256), randn(256, 512)]
    slots = [rule.init(p) for p in params]
    kernel = compiled(make_kernel([rule] * 2))
    run = partial(kernel, params, slots, params, [hyper(0.0)] * 2, torch.tensor(1.0), None)
    run()
    assert counted_peak(run) < params[0].numel() * 4 / 8
