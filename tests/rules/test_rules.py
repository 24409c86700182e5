"""One table, every rule x every property; parity with torch.optim; and the parts of `core` that all rules share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.close import assert_follows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from engine.step.compile import compiled
from engine.step.kernel import make_kernel
from optimizers import linalg
from optimizers.apply import add, refresh
from optimizers.contract import Group, Rule, Slots, UsageError, state_bytes
from optimizers.partition import partition, route, stagger
from optimizers.random import Key, fold, normal, permutation, signs
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


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def copied(slots: Slots) -> Slots:
    return {k: v.clone() for k, v in slots.items()}


def same(a: Slots, b: Slots) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    slots, w, tall = rule.init(p), p.double().numpy(), shape[0] >= shape[1]
    m = v = np.zeros((shape[0], RANK) if tall else (RANK, shape[1]))
    q, since, way = None, 0, np.zeros(shape)
    for t in range(1, 11):
        g = randn(*shape, seed=t) @ torch.diag(torch.arange(1, shape[1] + 1) ** -1.0)
        if (t - 1) % GAP == 0:
            old, (slots, ok) = q, rule.refresh(g, slots, Key(t))
            assert ok
            q = slots["basis"].double().numpy()
            u, _, vh = np.linalg.svd(g.double().numpy(), full_matrices=False)
            exact = vh[:RANK].T if tall else u[:, :RANK]
            if method == "svd":
                np.testing.assert_allclose(np.abs((q * exact).sum(0)), 1, atol=1e-5)
            if old is not None and moments == "reset":
                m, v, since = np.zeros_like(m), np.zeros_like(v), t - 1
            elif old is not None and moments == "rotate":
                r = q.T @ old
                m, v = (m @ r.T, v @ (r**2).T) if tall else (r @ m, r**2 @ v)
        d = g.double().numpy()
        c = d @ q if tall else q.T @ d
        m, v = b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2
        n = m / (np.sqrt(v) + eps) * np.sqrt(1 - b2 ** (t - since)) / (1 - b1 ** (t - since))
        before = w
        w = w - lr * scale * (n @ q.T if tall else q @ n)
        w = w - lr * wd * w
        way += np.abs(w - before)
        delta, slots = rule.update(g, slots, p, hyper(lr, wd))
        p = add(p, delta)
        assert_follows(p, w, way, atol=1e-6, said=f"step {t}")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: galore(moments="drop"), "moments .* got 'drop'"),
        (lambda: galore(basis="exact"), "basis .* got 'exact'"),
        (lambda: muon(adjust_lr="spectral"), "adjust_lr .* got 'spectral'"),
        (lambda: muon(orthogonalize="qr"), "orthogonalize .* got 'qr'"),
        (lambda: sgd(0.0, nesterov=True), "nesterov needs a momentum"),
        (lambda: muon().init(torch.zeros(3)), r"muon needs a matrix, got shape \(3,\)"),
        (lambda: galore(9).init(torch.zeros(8, 20)), r"rank must lie in \[1, 8\] .* got 9"),
        (lambda: galore(1).init(torch.zeros(8)), "needs a matrix"),
    ],
)
def test_what_cannot_be_done_is_named(make, named):
    with pytest.raises(UsageError, match=named):
        make()


# core ---------------------------------------------------------------------------------------------------------------


def group(name: str, *match: str, rule: Rule | None = None) -> Group:
    return Group(name, rule or sgd(), match, 0.1)


def test_the_first_group_that_matches_owns_a_parameter():
    names = ["model.layers.0.mlp.weight", "model.norm.weight", "lm_head.weight"]
    owner = route(names, [group("norms", "norm"), group("head", r"^lm_head"), group("rest", "")])
    assert [owner[n].name for n in names] == ["rest", "norms", "head"]


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([group("a", "mlp")], "'model.norm' is owned by no rule; .* one of \\['a'\\]"),
        ([group("a", ""), group("b", "attention")], "pattern 'attention' of 'b' matches no parameter"),
        ([group("a", "mlp", "conv"), group("b", "")], "pattern 'conv' of 'a'"),
        ([group("a", ""), group("b", "norm")], "group 'b' owns nothing"),
    ],
)
def test_routing_is_loud_both_ways(groups, named):
    with pytest.raises(UsageError, match=named):
        route(["model.mlp", "model.norm"], groups)


def test_a_rule_that_cannot_serve_a_tensor_names_it():
    params = {"a.weight": torch.zeros(8, 8), "a.bias": torch.zeros(8)}
    optimizer = partition(params, [group("all", "", rule=galore(4))])
    with pytest.raises(UsageError, match=r"a.bias \(8,\): a subspace rule needs a matrix"):
        optimizer.init(params)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 60))
def test_staggered_refreshes_are_spread_evenly(sizes, gap):
    offsets = stagger({str(i): size for i, size in enumerate(sizes)}, gap)
    work = [0] * gap
    for i, size in enumerate(sizes):
        work[offsets[str(i)]] += size
    assert list(offsets) == [str(i) for i in range(len(sizes))]
    assert max(work) <= sum(sizes) / gap + max(sizes)
    assert offsets == stagger({str(i): 3 * size for i, size in enumerate(sizes)}, gap)
    assert offsets == stagger({str(i): size for i, size in reversed(list(enumerate(sizes)))}, gap), "by name"


@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("compat", ["", "sn-sm"])
def test_refreshes_come_once_a_period(staggered, compat):
    params = {f"w{i}": torch.zeros(8, 8) for i in range(5)} | {"b": torch.zeros(8)}
    rule = adam_snsm(4, 10, compat=compat)
    optimizer = partition(params, [group("sm", "w", rule=rule), group("rest", "b")], staggered=staggered)
    assert optimizer.due(0) == tuple(f"w{i}" for i in range(5)), "all on the first step"
    later = [step % 10 for step in range(1, 41) for name in optimizer.due(step) for _ in (name,)]
    first = 9 if compat else 0
    expected = [(first + 2 * i) % 10 for i in range(5)] if staggered else [first] * 5
    assert sorted(later) == sorted(expected * 4)


def test_refresh_rebuilds_what_is_due_and_was_given():
    params = {f"w{i}": randn(8, 8, seed=i) for i in range(3)}
    optimizer = partition(params, [group("all", "", rule=galore(4, 10))], staggered=False)
    grads = {"w0": randn(8, 8, seed=7), "w1": torch.zeros(8, 8), "w2": randn(8, 8)}
    state, _ = refresh(optimizer, params, optimizer.init(params), 0, Key(0))
    before = {n: copied(s) for n, s in state.items()}
    untouched, flags = refresh(optimizer, grads, state, 3, Key(0))
    assert untouched == state and flags == []
    some = {n: grads[n] for n in ("w0", "w1")}
    new, flags = refresh(optimizer, some, state, 10, Key(0))
    assert [bool(f) for f in flags] == [True, False], "no basis from a gradient of zeros"
    assert all(same(state[n], before[n]) for n in params), "inputs are not mutated"
    assert not torch.equal(new["w0"]["basis"], state["w0"]["basis"])
    assert same(new["w1"], state["w1"]) and new["w2"] is state["w2"]
    again, _ = refresh(optimizer, some, state, 10, Key(0))
    assert torch.equal(again["w0"]["basis"], new["w0"]["basis"]), "a draw depends on key, name and step alone"


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
