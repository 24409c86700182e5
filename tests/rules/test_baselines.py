"""The baselines: parity with torch.optim, and GaLore's and SCALE's algorithms in float64."""

import numpy as np
import pytest
import torch
from helpers.close import assert_follows
from helpers.matrices import hyper, randn
from reference.baselines import AdamW, Galore, Scale

from optimizers.apply import add
from optimizers.contract import Rule, UsageError
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.scale import scale
from optimizers.rules.sgd import sgd

RANK, GAP = 4, 3


# torch.optim --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "library", "decay"),
    [
        (adamw(), lambda q: torch.optim.AdamW(q, lr=0.01, weight_decay=0.1), 0.1),
        (adamw((0.8, 0.95), 1e-4), lambda q: torch.optim.AdamW(q, lr=0.01, betas=(0.8, 0.95), eps=1e-4), 0.01),
        (sgd(), lambda q: torch.optim.SGD(q, lr=0.01, momentum=0.9), 0.0),
        (sgd(nesterov=True), lambda q: torch.optim.SGD(q, lr=0.01, momentum=0.9, nesterov=True), 0.0),
        (sgd(0.0), lambda q: torch.optim.SGD(q, lr=0.01), 0.0),
        (muon(), lambda q: torch.optim.Muon(q, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), 0.1),
        (muon(adjust_lr="original"), lambda q: torch.optim.Muon(q, lr=0.01, adjust_lr_fn="original"), 0.1),
        (
            muon(nesterov=False),
            lambda q: torch.optim.Muon(q, 0.01, 0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"),
            0.1,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else "",
)
def test_parity_with_torch(rule, library, decay):
    ours = [randn(16, 24), randn(24, 16, seed=1)]
    theirs = [p.clone().requires_grad_() for p in ours]
    optimizer, slots = library(theirs), [rule.init(p) for p in ours]
    for t in range(20):
        for i, q in enumerate(theirs):
            q.grad = randn(*q.shape, seed=100 + 2 * t + i)
            delta, slots[i] = rule.update(q.grad.clone(), slots[i], ours[i], hyper(0.01, decay))
            ours[i] = add(ours[i], delta)
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert float((p - q).norm() / q.norm()) < 1e-6


# GaLore -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("method", ["svd", "range"])
def test_galore_is_its_algorithm_in_float64(moments, shape, method):
    b1, b2, eps, lr, wd, scale = 0.9, 0.999, 1e-6, 0.01, 0.1, 0.25
    rule, p = galore(RANK, GAP, scale, (b1, b2), eps, moments, method), randn(*shape)
    slots, replay, way = rule.init(p), Galore(p.numpy(), RANK, scale, b1, b2, eps, moments), np.zeros(shape)
    for t in range(1, 11):
        g = randn(*shape, seed=t) @ torch.diag(torch.arange(1, shape[1] + 1) ** -1.0)
        if (t - 1) % GAP == 0:
            slots, ok = rule.refresh(g, slots, Key(t))
            assert ok
            q = slots["basis"].double().numpy()
            if method == "svd":
                np.testing.assert_allclose(np.abs((q * replay.leading(g.numpy())).sum(0)), 1, atol=1e-5)
            replay.refresh(q)
        before = replay.w
        replay.step(g.numpy(), lr, wd)
        way += np.abs(replay.w - before)
        delta, slots = rule.update(g, slots, p, hyper(lr, wd))
        p = add(p, delta)
        assert_follows(p, replay.w, way, atol=1e-6, said=f"step {t}")


# SCALE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize(("each", "axis"), [("row", 1), ("column", 0)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scale_is_its_algorithm_in_float64(shape, each, axis, momentum):
    rule, p = scale(momentum, each), randn(*shape)
    slots, replay, way = rule.init(p), Scale(p.numpy(), momentum, axis), np.zeros(shape)
    for t in range(10):
        g = randn(*shape, seed=t) * 10.0 ** (t % 3 - 4)
        before = replay.w
        replay.step(g.numpy(), 0.01, 0.1)
        way += np.abs(replay.w - before)
        delta, slots = rule.update(g, slots, p, hyper(0.01, 0.1))
        p = add(p, delta)
        assert_follows(p, replay.w, way, said=f"step {t}")


def test_scale_keeps_nothing_without_momentum_and_a_row_of_zeros_rests():
    rule, p, g = scale(), randn(6, 4), randn(6, 4, seed=1)
    g[2] = 0
    assert rule.init(p) == {} and rule.slots == ()
    delta, _ = rule.update(g, {}, p, hyper(1.0))
    assert not delta[2].any()
    torch.testing.assert_close(delta.square().mean(1).sqrt(), (g != 0).any(1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_adamw_is_its_algorithm_in_float64(eps):
    rule, p = adamw((0.8, 0.95), eps), randn(9, 5)
    slots, replay, w, way = rule.init(p), AdamW(b1=0.8, b2=0.95, eps=eps), p.double(), np.zeros(p.shape)
    for t in range(20):
        g, before = randn(9, 5, seed=t + 1), w
        w = replay.step(w, g, 0.01, 0.1)
        way += (w - before).abs().numpy()
        delta, slots = rule.update(g, slots, p, hyper(0.01, 0.1))
        p = add(p, delta)
        assert_follows(p, w, way, said=f"step {t}")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: galore(moments="drop"), "moments .* got 'drop'"),
        (lambda: galore(basis="exact"), "basis .* got 'exact'"),
        (lambda: muon(adjust_lr="spectral"), "adjust_lr .* got 'spectral'"),
        (lambda: muon(orthogonalize="qr"), "orthogonalize .* got 'qr'"),
        (lambda: sgd(0.0, nesterov=True), "nesterov needs a momentum"),
        (lambda: scale(1.0), "momentum must lie in .* got 1.0"),
        (lambda: scale(each="entry"), "each must be .* got 'entry'"),
        (lambda: scale(eps=0.0), "eps must be above 0, got 0.0"),
        (lambda: scale().init(torch.zeros(3)), r"scale needs a matrix, got shape \(3,\)"),
        (lambda: muon().init(torch.zeros(3)), r"muon needs a matrix, got shape \(3,\)"),
        (lambda: galore(9).init(torch.zeros(8, 20)), r"rank must lie in \[1, 8\] .* got 9"),
        (lambda: galore(1).init(torch.zeros(8)), "needs a matrix"),
    ],
)
def test_what_cannot_be_done_is_named(make, named):
    with pytest.raises(UsageError, match=named):
        make()
