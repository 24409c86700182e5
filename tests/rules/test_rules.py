"""One table, every rule x every property."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from helpers.matrices import copied, hyper, randn, same
from torch import Tensor
from torch._dynamo.utils import counters

from optimizers.apply import add
from optimizers.compile import compiled
from optimizers.contract import Rule, Slots, state_bytes
from optimizers.kernel import make_kernel
from optimizers.random import Key, fold
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import adagrad_sn, adagrad_snsm, adam_sm, adam_sn, adam_snsm, rmsprop_sn, sgd_sm, snsm
from optimizers.rules.sumo import sumo, sumo_paper, sumo_release

RANK, GAP = 4, 3
SUBSPACE = (RANK, GAP)


class Case(NamedTuple):
    rule: Rule
    lr: float
    """At which it solves the quadratic below."""
    floats: Callable[[int, int], int]
    """Floats of state for an m x n matrix, without the clock."""


def basis(m: int, n: int, momentum: int = 1) -> int:
    """A basis of the shorter side and `momentum` tensors of coordinates."""
    return RANK * min(m, n) + momentum * RANK * max(m, n)


CASES = {
    "adamw": Case(adamw(), 0.2, lambda m, n: 2 * m * n),
    "sgd": Case(sgd(), 0.1, lambda m, n: m * n),
    "sgd nesterov": Case(sgd(nesterov=True), 0.1, lambda m, n: m * n),
    "muon": Case(muon(), 0.5, lambda m, n: m * n),
    "muon exact": Case(muon(orthogonalize="exact"), 0.5, lambda m, n: m * n),
    "galore": Case(galore(*SUBSPACE), 1.0, lambda m, n: basis(m, n, 2)),
    "adam_sn": Case(adam_sn(), 0.5, lambda m, n: m * n + max(m, n)),
    "adagrad_sn": Case(adagrad_sn(), 1.0, lambda m, n: m * n + max(m, n)),
    "rmsprop_sn": Case(rmsprop_sn(), 0.02, lambda m, n: max(m, n)),
    "adam_snsm": Case(adam_snsm(*SUBSPACE), 0.5, lambda m, n: basis(m, n) + max(m, n)),
    "adagrad_snsm": Case(adagrad_snsm(*SUBSPACE), 5.0, lambda m, n: basis(m, n) + max(m, n)),
    "sgd_sm": Case(sgd_sm(*SUBSPACE), 0.2, lambda m, n: basis(m, n)),
    "adam_sm": Case(adam_sm(*SUBSPACE, eps=0.1), 0.5, lambda m, n: basis(m, n) + m * n),
    "snsm": Case(snsm(*SUBSPACE), 0.5, lambda m, n: basis(m, n) + max(m, n)),
    "snsm topk": Case(snsm(*SUBSPACE, proj_type="topk"), 0.5, lambda m, n: 2 * RANK + RANK * min(m, n) + max(m, n)),
    "sumo": Case(sumo(*SUBSPACE), 0.5, lambda m, n: basis(m, n)),
    "sumo range": Case(sumo(*SUBSPACE, basis="range"), 0.5, lambda m, n: basis(m, n)),
    "sumo orthogonal": Case(sumo(*SUBSPACE, perpendicular="orthogonal", alpha=1.0), 0.5, lambda m, n: basis(m, n)),
    "sumo_paper": Case(sumo_paper(*SUBSPACE), 0.5, lambda m, n: basis(m, n) + 1),
    "sumo_release": Case(sumo_release(*SUBSPACE), 0.1, lambda m, n: basis(m, n) + 1),
    "sumo track": Case(sumo(*SUBSPACE, basis="track", side="longer"), 0.5, lambda m, n: basis(m, n)),
}
SHAPES = [(12, 8), (8, 12), (9, 9), (2, 8, 6)]
each_rule = pytest.mark.parametrize("name", CASES)
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def started(rule: Rule, p: Tensor, steps: int = 2) -> Slots:
    """State after some steps, so that nothing in it is zero."""
    slots = rule.init(p)
    for t in range(steps):
        g = randn(*p.shape, seed=90 + t).to(p.dtype)
        if rule.refresh:
            slots, _ = rule.refresh(g, slots, Key(t))
        _, slots = rule.update(g, slots, p, hyper(0.01))
    return slots


# every rule ---------------------------------------------------------------------------------------------------------


@each_rule
@each_shape
@each_dtype
def test_inputs_are_not_mutated_and_kinds_are_kept(name, shape, dtype):
    rule, p, g = CASES[name].rule, randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
    first, slots, h = rule.init(p), started(rule, p), hyper(0.01, 0.1)
    before = copied(slots), p.clone(), g.clone()
    delta, new = rule.update(g, slots, p, h)
    moved = add(p, delta)
    assert delta.shape == p.shape and delta.dtype == torch.float32 and delta.any()
    assert moved.shape == p.shape and moved.dtype == dtype and moved.isfinite().all()
    results = [new]
    if rule.refresh:
        rebuilt, ok = rule.refresh(g, slots, Key(7))
        assert ok.shape == () and ok.dtype == torch.bool and ok
        results.append(rebuilt)
    assert same(slots, before[0]) and torch.equal(p, before[1]) and torch.equal(g, before[2])
    assert same(h, hyper(0.01, 0.1))
    for result in results:
        assert {k: (v.shape, v.dtype) for k, v in result.items()} == {k: (v.shape, v.dtype) for k, v in first.items()}
        assert all(v.is_contiguous() for v in result.values())
    assert all(v.is_contiguous() and v.dtype != torch.bfloat16 for v in first.values()), "moments are float32"


@each_rule
def test_state_holds_what_the_formula_says_on_any_device(name):
    rule, floats = CASES[name].rule, CASES[name].floats
    for shape in ((12, 8), (8, 12), (9, 9)):
        slots = rule.init(torch.empty(shape, device="meta", dtype=torch.bfloat16))
        assert all(v.device.type == "meta" for v in slots.values())
        scalars = {k: v for k, v in slots.items() if k in ("step", "bias_correction")}
        assert state_bytes(slots) - state_bytes(scalars) == 4 * floats(*shape)


@each_rule
def test_decreases_a_quadratic(name):
    rule, lr, _ = CASES[name]
    p, target = randn(12, 8), randn(12, 8, seed=1)
    slots, losses = rule.init(p), []
    for t in range(100):
        g = p - target
        losses.append(float(g.square().sum()))
        if rule.refresh and t % rule.gap == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        delta, slots = rule.update(g, slots, p, hyper(lr * (1 - t / 100)))
        p = add(p, delta)
    assert losses[-1] < 0.1 * losses[0]


@each_rule
def test_weight_decay_pulls_towards_zero(name):
    """By lr times wd, up to what the order of decay and step changes."""
    rule, p, g = CASES[name].rule, randn(12, 8), randn(12, 8, seed=1)
    slots = started(rule, p)
    with_decay, without = (rule.update(g, slots, p, hyper(1e-3, wd))[0] for wd in (0.1, 0.0))
    torch.testing.assert_close(with_decay - without, -1e-4 * p, rtol=2e-2, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].rule.refresh])
@each_shape
def test_bases_are_orthonormal_and_a_useless_gradient_keeps_them(name, shape):
    rule, p = CASES[name].rule, randn(*shape)
    assert rule.refresh and rule.gap == GAP
    slots = started(rule, p)
    if "basis" in slots:
        eye = slots["basis"].mT @ slots["basis"]
        torch.testing.assert_close(eye, torch.eye(RANK).expand_as(eye), rtol=0, atol=1e-5)
    for bad in (torch.full(shape, float("nan")), torch.full(shape, float("inf")), torch.zeros(shape)):
        kept, ok = rule.refresh(bad, slots, Key(3))
        assert not ok
        assert torch.equal(kept.get("basis", kept.get("index")), slots.get("basis", slots.get("index")))
        assert all(v.isfinite().all() for v in kept.values())


# compiled -----------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    params: Sequence[Tensor]
    slots: Sequence[Slots]
    graphs: int


def trajectory(make: Callable) -> Trajectory:
    """Three steps of every rule in one kernel, on a schedule, with a refresh between the steps of those that have one.

    One kernel, as compiling many small graphs takes minutes.
    """
    rules = [case.rule for case in CASES.values()]
    params = [randn(*SHAPES[i % 3], seed=i).to((torch.float32, torch.bfloat16)[i % 4 == 3]) for i in range(len(rules))]
    slots = [rule.init(p) for rule, p in zip(rules, params, strict=True)]
    kernel = make(make_kernel(rules, clip="tensor"))
    counters.clear()
    for t in range(3):
        grads = [randn(*p.shape, seed=40 + t).to(p.dtype) for p in params]
        for i, rule in enumerate(rules):
            if rule.refresh and t != 1:
                slots[i] = rule.refresh(grads[i], slots[i], fold(0, i, t))[0]
        kernel(grads, slots, params, [hyper(0.01 / (t + 1), 0.1 * t)] * len(rules), torch.tensor(3.0 + t), None)
    return Trajectory(params, slots, counters["stats"]["unique_graphs"])


@pytest.mark.compiles
def test_compiled_equals_eager_and_a_schedule_does_not_recompile():
    fast, slow = trajectory(compiled), trajectory(lambda kernel: kernel)
    assert fast.graphs == 1 and slow.graphs == 0
    for i, name in enumerate(CASES):
        rough = name in ("muon", "sumo orthogonal") or fast.params[i].dtype == torch.bfloat16  # they iterate in it
        tolerance = dict(rtol=1e-2, atol=1e-3) if rough else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fast.params[i], slow.params[i], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        for slot in fast.slots[i]:
            torch.testing.assert_close(fast.slots[i][slot], slow.slots[i][slot], **tolerance)
