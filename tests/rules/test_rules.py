"""The contract of a rule: every rule of the registry x every property. A rule that is listed there is tested here."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from helpers.matrices import copied, hyper, randn, same
from torch import Tensor
from torch._dynamo.utils import counters

from optimizers.apply import add
from optimizers.compile import compiled
from optimizers.contract import Kind, Rule, Slots, state_bytes
from optimizers.kernel import make_kernel
from optimizers.random import Key, fold
from optimizers.registry import RULES
from tests.support import RANK, small
from tests.support import RULES as ONE_A_FILE

# Every rule with a subspace that fits, and some with an option that is another way through its code.
VARIANTS: dict[str, tuple[str, dict]] = {
    "sgd nesterov": ("sgd", dict(nesterov=True)),
    "muon exact": ("muon", dict(orthogonalize="exact")),
    "snsm topk": ("snsm", dict(proj_type="topk")),
    "sumo range": ("sumo", dict(basis="range")),
    "sumo orthogonal": ("sumo", dict(perpendicular="orthogonal", alpha=1.0)),
    "sumo track": ("sumo", dict(basis="track", side="longer")),
}
CASES: dict[str, Rule] = {name: small(family) for name, family in RULES.items()}
CASES |= {case: small(RULES[name], **options) for case, (name, options) in VARIANTS.items()}
QUICK = tuple(ONE_A_FILE)
RATES = (0.5, 0.1, 1.0, 0.02, 5.0)  # the quadratic below is solved at one of them
GENTLE = {"adam_sm": dict(eps=0.1)}  # it divides a whole gradient by its own size, however small both are
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
    rule, p, g = CASES[name], randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype)
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
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_every_slot_is_declared_and_takes_on_any_device_what_it_takes_here(name, shape):
    rule = CASES[name]
    slots, here = rule.init(torch.empty(shape, device="meta", dtype=torch.bfloat16)), rule.init(torch.zeros(shape))
    assert set(slots) == set(here) == {slot.name for slot in rule.slots}
    assert all(v.device.type == "meta" for v in slots.values())
    assert state_bytes(slots) == state_bytes(here)
    assert all(slots[n].numel() <= 2 for n in rule.names(Kind.COUNTER)), "numbers, such as of steps"
    assert all(here[n].dtype == torch.float32 for n in rule.names(Kind.FIRST, Kind.SECOND, Kind.BASIS, Kind.WEIGHT))


def solved(rule: Rule, lr: float) -> bool:
    """Whether a hundred steps take a quadratic to a tenth."""
    p, target = randn(12, 8), randn(12, 8, seed=1)
    slots, losses = rule.init(p), []
    for t in range(100):
        g = p - target
        losses.append(float(g.square().sum()))
        if rule.refresh and t % rule.gap == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        delta, slots = rule.update(g, slots, p, hyper(lr * (1 - t / 100)))
        p = add(p, delta)
    return losses[-1] < 0.1 * losses[0]


@each_rule
def test_decreases_a_quadratic(name):
    rule = small(RULES[name], **GENTLE[name]) if name in GENTLE else CASES[name]
    assert any(solved(rule, lr) for lr in RATES)


@each_rule
def test_weight_decay_pulls_towards_zero(name):
    """By lr times wd, up to what the order of decay and step changes."""
    rule, p, g = CASES[name], randn(12, 8), randn(12, 8, seed=1)
    slots = started(rule, p)
    with_decay, without = (rule.update(g, slots, p, hyper(1e-3, wd))[0] for wd in (0.1, 0.0))
    torch.testing.assert_close(with_decay - without, -1e-4 * p, rtol=2e-2, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].refresh])
@each_shape
def test_bases_are_orthonormal_and_a_useless_gradient_keeps_them(name, shape):
    rule, p = CASES[name], randn(*shape)
    assert rule.gap >= 1
    assert rule.gap == rule.settings().get("update_proj_gap", rule.gap), "the option is what is done"
    slots = started(rule, p)
    bases = {n: slots[n] for n in rule.names(Kind.BASIS, Kind.INDEX)}
    for q in bases.values():
        if q.is_floating_point() and q.shape[-1] == RANK:
            eye = q.mT @ q
            torch.testing.assert_close(eye, torch.eye(RANK).expand_as(eye), rtol=0, atol=1e-5)
    for bad in (torch.full(shape, float("nan")), torch.full(shape, float("inf")), torch.zeros(shape)):
        kept, ok = rule.refresh(bad, slots, Key(3))
        assert not ok
        assert all(torch.equal(kept[n], q) for n, q in bases.items())
        assert all(v.isfinite().all() for v in kept.values())


# compiled -----------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    params: Sequence[Tensor]
    slots: Sequence[Slots]
    graphs: int


def trajectory(make: Callable, rules: Sequence[Rule]) -> Trajectory:
    """Three steps of these rules in one kernel, on a schedule, with a refresh between the steps of those that have one.

    One kernel, as compiling many small graphs takes minutes.
    """
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
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["one a file", "all"]
)
def test_compiled_equals_eager_and_a_schedule_does_not_recompile(names):
    rules = [CASES[name] for name in names]
    fast, slow = trajectory(compiled, rules), trajectory(lambda kernel: kernel, rules)
    assert fast.graphs == 1 and slow.graphs == 0
    for i, (name, rule) in enumerate(zip(names, rules, strict=True)):
        iterates = {"newton_schulz", "orthogonal"} & set(map(str, rule.settings().values()))  # in bfloat16
        rough = iterates or fast.params[i].dtype == torch.bfloat16
        tolerance = dict(rtol=1e-2, atol=1e-3) if rough else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fast.params[i], slow.params[i], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        for slot in fast.slots[i]:
            torch.testing.assert_close(fast.slots[i][slot], slow.slots[i][slot], **tolerance)


@pytest.mark.compiles
@pytest.mark.parametrize("names", [("muon",), pytest.param(tuple(CASES), marks=pytest.mark.slow)], ids=["muon", "all"])
def test_compiled_kernels_round_stochastically_as_eager_ones_do_whichever_side_is_longer(names):
    """Sides are multiples of 32, the width of a vector of bfloat16: torch 2.13's code for AVX-512 gave NaN where a
    result of the rule was read across."""
    rules = [CASES[name] for name in names for _ in range(2)]
    sides = [((64, 32), (32, 64))[i % 2] for i in range(len(rules))]
    seed = torch.arange(len(rules), dtype=torch.int32) * 7919
    moved = []
    for make in (compiled, lambda kernel: kernel):
        params = [randn(*side, seed=i).to(torch.bfloat16) for i, side in enumerate(sides)]
        grads = [randn(*side, seed=50 + i).to(torch.bfloat16) for i, side in enumerate(sides)]
        slots = [rule.init(p) for rule, p in zip(rules, params, strict=True)]
        for i, rule in enumerate(rules):
            if rule.refresh:
                slots[i] = rule.refresh(grads[i], slots[i], Key(i))[0]
        make(make_kernel(rules))(grads, slots, params, [hyper(0.01)] * len(rules), torch.tensor(1.0), seed)
        moved.append(params)
    for i, (fast, slow) in enumerate(zip(*moved, strict=True)):
        before, apart = randn(*sides[i], seed=i), fast.float() - slow.float()
        allowed = 0.1 * (slow.float() - before).norm() + 2.0**-8 * before.norm()  # iterations in bfloat16; a neighbour
        assert float(apart.norm()) <= float(allowed), names[i // 2]
