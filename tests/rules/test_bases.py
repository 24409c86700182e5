"""Every basis of every rule: how large a gradient is does not matter to it, what says nothing is refused and told, and
the first gradient that says something gives it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.grids import covering
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from optimizers import linalg
from optimizers.apply import add, refresh, update
from optimizers.contract import Group, Optimizer, Params, Rule, Slots
from optimizers.linalg.polar import METHODS, newton_schulz, polar
from optimizers.moments import factored
from optimizers.partition import partition
from optimizers.random import Key, fold, word
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo, sumo_paper, sumo_release
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.subspace import draw, subspace
from optimizers.wrappers.traversal import coordinates, layers, tensors, traversal

GAP = 5
Make = Callable[[int], Rule]
KEPT = ("keep", "reset", "rotate")
MAKES: dict[str, Make] = {
    **{
        f"galore {b} {m}": lambda r, b=b, m=m: galore(r, GAP, basis=b, moments=m)
        for b in ("range", "svd")
        for m in KEPT
    },
    **{
        f"snsm {kind} {m}": lambda r, kind=kind, m=m: snsm(r, GAP, proj_type=kind, moments=m)
        for kind, m in [
            *product(("auto", "topk", "srht"), KEPT),
            *product(("svd", "range", "random", "uniform"), KEPT[1:2]),
        ]
    },
    **{f"sn-sm {kind}": lambda r, kind=kind: snsm(r, GAP, proj_type=kind, compat="sn-sm") for kind in ("svd", "topk")},
    **{
        f"sumo {basis} {side}": lambda r, basis=basis, side=side: sumo(r, GAP, basis=basis, side=side)
        for basis, side in product(("random", "range", "svd", "track"), ("shorter", "longer"))
    },
    **{f"sumo {p}": lambda r, p=p: sumo(r, GAP, perpendicular=p) for p in ("normalized", "orthogonal")},
    "sumo reset": lambda r: sumo(r, GAP, moments="reset"),
    "sumo_paper": lambda r: sumo_paper(r, GAP),
    "sumo_release": lambda r: sumo_release(r, GAP),
}
SHAPES = [(12, 8), (8, 12), (3, 9, 9)]
SCALES = [1e-30, 1e-22, 1e19, 1e30]
each_make = pytest.mark.parametrize("name", MAKES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hyper(lr: float = 0.01, weight_decay: float = 0.0) -> dict[str, Tensor]:
    return {"lr": torch.tensor(lr), "weight_decay": torch.tensor(weight_decay)}


def gradient(*shape: int, seed: int = 0) -> Tensor:
    """Matrices whose singular values halve, so that directions are well separated at any scale; about 1 in size."""
    u, _, vh = torch.linalg.svd(randn(*shape, seed=seed), full_matrices=False)
    return 3 * u * 0.5 ** torch.arange(min(shape[-2:])) @ vh


def span(slots: Slots, like: Tensor) -> Tensor:
    """The projection as a matrix that signs and rotations of a basis leave as it is, or the picked slices in order."""
    if "basis" in slots:
        return slots["basis"] @ slots["basis"].mT
    return torch.cat([x.flatten().double() for x in (slots["index"], slots.get("signs", slots["index"][:0]))])


SIZES = [
    ((12, 8), 3, torch.float32),
    ((8, 12), 8, torch.float32),
    ((8, 12), 3, torch.bfloat16),
    ((2, 12, 8), 3, torch.float32),
]


@pytest.mark.parametrize(("name", "size"), covering(MAKES, SIZES), ids=str)
def test_a_basis_does_not_depend_on_how_large_a_gradient_is(name, size):
    """At the first refresh, and at a later one with a moment to carry over."""
    shape, rank, dtype = size
    rule, g = MAKES[name](rank), gradient(*shape).to(dtype)
    for scale in [1.0, *SCALES]:
        unit = 2.0 ** round(np.log2(scale))  # exact: the same gradient but for its size
        slots, ok = rule.refresh(g * unit, rule.init(g), Key(0))
        assert ok and not linalg.missing(slots["basis"]).any() if "basis" in slots else ok
        _, slots = rule.update(g * unit, slots, g, hyper())
        h = gradient(*shape, seed=1).to(dtype) * unit
        later, ok = rule.refresh(h, slots, Key(1))
        assert ok
        if scale == 1:
            first, second = span(slots, g), span(later, g)
        torch.testing.assert_close(span(slots, g), first, rtol=0, atol=1e-5)
        torch.testing.assert_close(span(later, g), second, rtol=0, atol=1e-5)
        if "basis" in later:
            eye = later["basis"].mT @ later["basis"]
            torch.testing.assert_close(eye, torch.eye(rank).expand_as(eye), rtol=0, atol=1e-5)
        assert not any(t.isnan().any() for t in later.values())


@pytest.mark.parametrize(("name", "scale"), covering(MAKES, [1e-38, 1e-30, 1e19, 1e30, 1e37]))
def test_no_size_makes_a_weight_nan(name, scale):
    """Also where a square leaves float32: with a refused refresh, and one that turns the moments, in between."""
    rule, p = MAKES[name](3), randn(12, 8)
    slots = rule.init(p)
    for t in range(6):
        g = scale * gradient(12, 8, seed=t) * (t != 3)
        slots, ok = rule.refresh(g, slots, Key(t))
        assert bool(ok) == (t != 3)
        delta, slots = rule.update(g, slots, p, hyper(1e-3 / max(1, scale)))
        p = add(p, delta)
        assert p.isfinite().all(), t
        assert not any(x.isnan().any() for x in slots.values()), t


@pytest.mark.parametrize(("name", "shape", "bad"), covering(MAKES, SHAPES, ["zero", "nan", "inf"]), ids=str)
def test_what_says_nothing_is_refused_and_told(name, shape, bad):
    rule, g = MAKES[name](3), gradient(*shape)
    slots, _ = rule.refresh(g, rule.init(g), Key(0))
    _, slots = rule.update(g, slots, g, hyper())
    if bad == "zero":
        g = torch.zeros(shape)
    else:
        g[..., 1, 2] = float(bad)
    for dtype in (torch.float32, torch.bfloat16):
        kept, ok = rule.refresh(g.to(dtype), slots, Key(1))
        assert not ok
        assert all(torch.equal(kept[slot], slots[slot]) for slot in slots if slot != "stale")


@each_make
def test_matrices_of_a_stack_are_refused_alone(name):
    """An idle expert keeps what it has (nothing, here), one that is not finite is told; the others get their bases."""
    rule, g = MAKES[name](3), gradient(3, 12, 8)
    if any(kind in name for kind in ("snsm random", "uniform", "srht")):
        return  # one projection for the whole stack, whatever its gradients are: nothing to refuse
    g[1] = 0
    slots, ok = rule.refresh(g, rule.init(g), Key(0))
    assert ok and none(slots).tolist() == [False, True, False]
    g[1], g[2, 0, 0] = gradient(12, 8, seed=4), torch.nan
    later, ok = rule.refresh(g, slots, Key(1))
    assert not ok and none(later).tolist() == [False, False, False]
    assert torch.equal(span(later, g)[2], span(slots, g)[2]) if "basis" in slots else True


def none(slots: Slots) -> Tensor:
    return linalg.missing(slots["basis"])[..., 0, 0] if "basis" in slots else (slots["index"] < 0).any(-1)


# the first gradient that says something ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), covering(MAKES, SHAPES), ids=str)
def test_a_basis_waits_for_the_first_gradient_that_gives_one(name, shape):
    """What trains from step 3 on is bitwise what a run that starts there does, the clock and the random key aside."""
    rule, p = MAKES[name](3), randn(*shape)
    optimizer = partition({"w": p}, [Group("all", rule, ("",), 0.01)])
    state, zero = optimizer.init({"w": p}), torch.zeros(shape)
    for t in range(3):
        state, _ = refresh(optimizer, {"w": zero}, state, t, Key(0))
        params, state = update(optimizer, {"w": zero}, state, {"w": p}, {"all": hyper()})
        assert torch.equal(params["w"], p) and not rule.built(state["w"])
    g = gradient(*shape)
    state, flags = refresh(optimizer, {"w": g}, state, 3, Key(0))
    assert rule.built(state["w"]) and flags == []
    direct, _ = rule.refresh(g, rule.init(p), fold(0, "w", 3))
    for slot in direct.keys() - {"step", "bias_correction"}:
        assert torch.equal(state["w"][slot], direct[slot]), slot
    once = {slot: t.clone() for slot, t in state["w"].items()}
    again, _ = rule.refresh(gradient(*shape, seed=9), once, Key(7), only_missing=True)
    assert all(torch.equal(again[slot], once[slot]) for slot in once), "what is built stays bitwise"


@pytest.mark.parametrize("inner", ["galore range reset", "snsm auto reset", "snsm topk reset", "sumo random shorter"])
@pytest.mark.parametrize("prox", [0.0, 0.1])
def test_also_inside_a_random_subspace(inner, prox):
    rule, w = subspace(MAKES[inner](3), 6, prox=prox), randn(12, 20)
    slots = rule.init(w) | {"P": draw("gaussian", Key(1), 20, 6)}
    slots, ok = rule.refresh(torch.zeros(12, 6), slots, Key(0))
    assert not ok and not rule.built(slots)
    slots, ok = rule.refresh(gradient(12, 6), slots, Key(3), only_missing=True)
    assert ok and rule.built(slots)
    again, _ = rule.refresh(gradient(12, 6, seed=2), slots, Key(4), only_missing=True)
    assert all(torch.equal(again[slot], slots[slot]) for slot in slots)


class Two(torch.nn.Module):
    """Two matrices, of which the second one's gradient is zero as long as the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(0.1 * randn(12, 12, seed=i)) for i in (1, 2))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return ((x @ self.a) + gate * (x @ self.b) - 1).square().mean()


@pytest.mark.parametrize(
    ("name", "stop"),
    covering(["galore range keep", "snsm auto reset", "snsm topk reset", "sumo random shorter"], [None, 1, 2, 3, 4]),
)
def test_the_engine_asks_until_there_is_one_and_resumes_bitwise(name, stop):
    """The second matrix has no gradient for three steps; a run that is stopped anywhere goes on as if never stopped."""

    def engine(model: Two, state: dict | None = None) -> Step:
        params = dict(model.named_parameters())
        optimizer = partition(params, [Group("all", replace(MAKES[name](3), gap=100), ("",), 0.01)], staggered=False)
        return Step(
            cut(model, lambda m, batch: m(**batch)),
            params,
            optimizer,
            state or optimizer.init(params),
            mode="off",
            key=Key(5),
        )

    def run(step: Step, steps: range) -> None:
        for t in steps:
            batch = {"x": randn(4, 12, seed=t), "gate": torch.tensor(float(t >= 3))}
            result = step([batch], {"all": hyper()}, t)
            assert [bool(ok) for ok in result.refreshed] == ([True, False] if t == 0 else [])

    whole = engine(Two())
    run(whole, range(3))
    assert whole.optimizer.owner["a"].rule.built(whole.state["a"])
    assert not whole.optimizer.owner["b"].rule.built(whole.state["b"])
    run(whole, range(3, 7))
    assert whole.optimizer.owner["b"].rule.built(whole.state["b"])
    if stop is not None:
        model = Two()
        first = engine(model)
        run(first, range(stop))
        state = {n: {k: t.clone() for k, t in slots.items()} for n, slots in first.state.items()}
        second = engine(model, state)
        run(second, range(stop, 7))
        for n, slots in whole.state.items():
            assert torch.equal(whole.params[n], second.params[n]), n
            assert all(torch.equal(t, second.state[n][k]) for k, t in slots.items()), n


# moments and their clock ---------------------------------------------------------------------------------------------


def test_moments_that_are_reset_start_with_their_clock():
    """An Adam step of n entries has a norm of about sqrt(n) at most; with the old clock it was 3.5 times that."""
    rule, p = galore(4, 20, 1.0, moments="reset", eps=1e-12), randn(16, 16)
    slots, sizes = rule.init(p), []
    for t in range(60):
        g = randn(16, 16, seed=t)
        if t % 20 == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
            assert slots["step"] == 0 and not slots["bias_correction"].any()
        delta, slots = rule.update(g, slots, p, hyper(1.0))
        sizes.append(float(delta.norm()))
    assert max(sizes) < 1.05 * 64**0.5, sizes
    assert slots["step"] == 20


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_a_mask_that_drops_moments_drops_their_clock(policy):
    params = {f"layers.{i}.w": randn(6, 6, seed=i) for i in range(2)}
    base = partition(params, [Group("all", galore(2, 4, moments="reset"), ("",), 0.01)])
    made = omgd(base, params, traversal(layers(params), Key(0), active=1, period=2), state_policy=policy)
    state = made.init(params)
    for t in range(8):
        if made.switches(t):
            _, state = made.switch(params, state, t, Key(0))
        trained = {n: randn(6, 6, seed=t) for n in made.split(params, state)[0]}
        state, _ = refresh(made, trained, state, t, Key(0))
        params, state = update(made, trained, state, params, {"all": hyper()})
        for n in trained:
            moment, count = state[n]["exp_avg_sq"], state[n]["step"]
            assert count > 0 and moment.any()
            c2 = state[n]["bias_correction"][1]
            assert c2 == pytest.approx(1 - 0.999 ** float(count), rel=1e-5), "as many steps as the moments have seen"


# polar factors, norms, sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**k for k in (-120, -60, 60, 120)])
def test_a_polar_factor_does_not_depend_on_the_size(method, scale):
    x = torch.stack([randn(7, 12), randn(7, 12, seed=1)])
    torch.testing.assert_close(polar(x * scale, method), polar(x, method), rtol=0, atol=1e-6)
    mixed = torch.stack([x[0] * scale, x[1]])
    torch.testing.assert_close(polar(mixed, method), polar(x, method), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**k for k in (-120, -60, 60, 120)])
def test_muon_moves_as_far_whatever_the_size(dtype, scale):
    x = randn(7, 12)
    assert torch.equal(newton_schulz(x * scale, 5, dtype), newton_schulz(x, 5, dtype)), "powers of two are exact"
    rule, p = muon(dtype=str(dtype).removeprefix("torch.")), torch.zeros(7, 12)
    small, large = (rule.update(g, rule.init(p), p, hyper())[0] for g in (x, x * scale))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-6)
    assert not rule.update(torch.zeros(7, 12), rule.init(p), p, hyper())[0].any()


@pytest.mark.parametrize("scale", [2.0**k for k in (-100, -60, 60, 100)])
@pytest.mark.parametrize("perpendicular", ["normalized", "orthogonal"])
def test_sumo_outside_its_subspace_moves_as_far_whatever_the_size(scale, perpendicular):
    rule, p = sumo(3, perpendicular=perpendicular), torch.zeros(12, 8)
    deltas = []
    for s in (1.0, scale):
        slots, _ = rule.refresh(gradient(12, 8) * s, rule.init(p), Key(0))
        deltas.append(rule.update(gradient(12, 8) * s, slots, p, hyper())[0])
    torch.testing.assert_close(*deltas, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0**k for k in (-120, -60, 60, 120)])
def test_means_of_a_second_moment_neither_overflow_nor_vanish(scale):
    v = randn(6, 9).square()
    torch.testing.assert_close(factored(v * scale) / scale, factored(v), rtol=1e-5, atol=0)
    assert not factored(torch.zeros(6, 9)).any()


# order ---------------------------------------------------------------------------------------------------------------


def shuffled(params: Params) -> Params:
    return {name: params[name] for name in reversed(params)}


def test_nothing_depends_on_the_order_of_parameters():
    params = {f"layers.{i}.{n}": randn(6, 4 + i, seed=i) for i in range(4) for n in ("q", "k")}

    def due(params: Params) -> list[list[str]]:
        optimizer: Optimizer = partition(params, [Group("all", galore(2, 7), ("",), 0.01)])
        return [sorted(optimizer.due(t)) for t in range(20)]

    assert due(params) == due(shuffled(params)) and len({tuple(names) for names in due(params)}) > 3
    for kinds in (tensors, lambda p: tensors(p, balance="numel"), layers):
        made, other = (traversal(kinds(p), Key(3), active=2, period=1) for p in (params, shuffled(params)))
        for t in range(12):
            names = [{n for i in m.active(t) for n in m.groups.names[i]} for m in (made, other)]
            assert names[0] == names[1]
    made, other = (traversal(coordinates(p), Key(3), keep=0.5, period=1) for p in (params, shuffled(params)))
    assert all(torch.equal(made.entries(n, 24, 3), other.entries(n, 24, 3)) for n in params)


def test_rounding_never_repeats():
    """Words for every tensor and step are distinct and of all 32 bits; 2^15 steps later they are others."""
    steps = [*range(2**13), *range(2**15, 2**15 + 2**13)]
    words = np.array([[word(1, "rounding", name, t) for name in ("a", "b")] for t in steps])
    assert len(np.unique(words)) > 0.9999 * words.size
    bits = (words.reshape(-1, 1) >> np.arange(32)) & 1
    assert (abs(bits.mean(0) - 0.5) < 0.02).all(), "each bit counts"


def test_each_tensor_is_rounded_with_a_word_of_its_own():
    """The kernel is given one a tensor, whatever their order, and no two steps of a long run have the same."""

    def moved(order: tuple[str, ...], t: int) -> Params:
        model = torch.nn.ParameterDict({n: torch.full((64,), 1.0, dtype=torch.bfloat16) for n in order})
        holder = Sum(model)
        params = dict(holder.named_parameters())
        optimizer = partition(params, [Group("all", sgd(0.0), ("",), 0.01)])
        step = Step(
            cut(holder, lambda m, batch: m(**batch)),
            params,
            optimizer,
            optimizer.init(params),
            mode="off",
            stochastic_rounding=True,
        )
        step([{"x": torch.ones(())}], {"all": hyper(1e-3)}, t)
        return {n: p.detach().clone() for n, p in params.items()}

    one, two = moved(("a", "b"), 0), moved(("b", "a"), 0)
    assert all(torch.equal(p, two[n]) for n, p in one.items())
    assert not torch.equal(one["held.a"], one["held.b"])
    assert not torch.equal(moved(("a",), 3)["held.a"], moved(("a",), 3 + 2**15)["held.a"])


class Sum(torch.nn.Module):
    def __init__(self, held: torch.nn.ParameterDict) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return sum((p.float() * x).sum() for p in self.held.values())
