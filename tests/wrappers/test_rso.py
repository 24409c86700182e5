"""RSO: projections, what it reduces to, what a turn changes, decay, the prox term and warm-up."""

import pytest
import torch
from helpers.grids import covering
from helpers.models import batches, distance, llama
from helpers.subspace import DECAY, KINDS, LR, PERIOD, dense, full, hypers, make, randn, run
from reference.rso import carried, descend, merged
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from optimizers.apply import update
from optimizers.contract import Group, State
from optimizers.partition import partition
from optimizers.random import Key, fold
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.state import Parked
from optimizers.wrappers.rso import SHARED, merge, rso
from optimizers.wrappers.subspace import draw

INNER = {
    "adamw": adamw(),
    "sgd": sgd(),
    "muon": muon(),
    "snsm": snsm(2, 5),
    "galore": galore(2, 5),
    "sumo": sumo(2, 5),
}
each_form = pytest.mark.parametrize("form", ["merged", "products"])
each_kind = pytest.mark.parametrize("kind", KINDS)


# Projections.


@each_kind
def test_p_is_unbiased(kind):
    """E P Pᵀ = I by Monte Carlo; P is a function of its key alone."""
    size, rank, count = 12, 5, 4000
    draws = torch.stack([draw(kind, fold(0, kind, i), size, rank) for i in range(count)])
    assert draws.dtype == torch.float32 and draws[0].is_contiguous()
    outer = draws @ draws.mT
    error = 5 * outer.std(0) / count**0.5 + 1e-6
    assert ((outer.mean(0) - torch.eye(size)).abs() <= error).all()
    assert torch.equal(draws[3], draw(kind, fold(0, kind, 3), size, rank)) and not torch.equal(draws[3], draws[4])
    if kind != "gaussian":
        inner = draws[:50].mT @ draws[:50]
        torch.testing.assert_close(inner, (size / rank) * torch.eye(rank).expand_as(inner), rtol=0, atol=1e-5)
    assert draw(kind, Key(0), 10**9, 10**6, "meta").shape == (10**9, 10**6)


def test_haar_is_uniform():
    """Signs too: QR alone has diagonals of one sign, and so a first column whose mean is not zero."""
    draws = torch.stack([draw("haar", fold(1, i), 6, 3) for i in range(4000)])
    assert (draws.mean(0).abs() <= 5 * draws.std(0) / 4000**0.5).all()


# The optimizer.


@pytest.mark.run
@each_form
@pytest.mark.parametrize("inner", INNER)
def test_full_rank_coordinates_are_the_inner_rule(form, inner):
    """P = I: B has W's shape, and a run is the dense run. Without decay, which rules differ on."""
    size = dict(hidden_size=16, intermediate_size=16, num_key_value_heads=4)  # every layer has 16 inputs
    reference = llama(2, **size)
    base, params = dense(reference, INNER[inner], sgd(), 0.0), dict(reference.named_parameters())
    plain = Step(cut(reference), params, base, base.init(params), mode="off")
    under = make(llama(2, **size), form, 16, 10**6, INNER[inner], sgd(), 0.0, options={"projection": "coordinate"})
    for slots in under.state.values():
        if "P" in slots:
            assert torch.equal(slots["P"], torch.eye(16))
    expected, got = run(plain), run(under)
    rough = dict(rel=1e-5) if inner in ("adamw", "sgd", "snsm") else dict(rel=2e-3)  # the others amplify rounding
    assert got == pytest.approx(expected, **rough)
    assert expected[0] != expected[-1]


@pytest.mark.run
@each_form
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "options", [{}, {"share": SHARED, "projection": "haar", "moments": "keep"}], ids=["", "shared"]
)
def test_any_inner_rule_lowers_the_loss_across_turns(form, inner, options):
    step, (batch,) = make(llama(1), form, rule=INNER[inner], decay=0.0, options=options), batches(0)
    losses, due = [], []
    for i in range(3 * PERIOD):
        step.switch(i)
        result = step([batch], hypers(step.optimizer), i)
        losses.append(result.loss.item())
        due.append(len(result.refreshed))
        assert all(result.refreshed)
    assert losses[-1] < losses[0] - 0.05
    if INNER[inner].refresh:
        assert [n == 7 for n in due[::PERIOD]] == [True] * 3, "each new P brings new bases"
    assert (
        step.optimizer.switches(PERIOD) and not step.optimizer.switches(0) and not step.optimizer.switches(PERIOD + 1)
    )


def test_both_forms_are_one_method():
    """Without rounding to bfloat16 and decay the two differ by float32's rounding alone."""
    a, b = (make(llama(2), form, rule=sgd(), rest=sgd(), decay=0.0) for form in ("merged", "products"))
    assert run(a) == pytest.approx(run(b), rel=1e-4)
    assert distance(full(a), full(b)) < 1e-4
    assert all("B" not in slots for slots in a.state.values()), "merged holds no B"


@pytest.mark.parametrize(
    ("form", "moments", "share"), covering(["merged", "products"], ["reset", "keep", "transform"], [(), SHARED])
)
def test_a_turn_changes_p_and_not_the_loss(form, moments, share):
    step = make(llama(2), form, options={"moments": moments, "share": share})
    run(step, PERIOD)
    (batch,) = batches(50)
    before, old = step.chain.loss(step.tensors(), batch)[0], {n: dict(s) for n, s in step.state.items()}
    weights = full(step)
    kept = {n: {k: t.clone() for k, t in s.items()} for n, s in old.items()}
    assert step.switch(PERIOD) and not step.switch(PERIOD + 1)
    assert step.chain.loss(step.tensors(), batch)[0].item() == pytest.approx(before.item(), rel=1e-6)
    assert distance(step.params, weights) < 1e-6 and list(step.state) == list(step.params)
    for name, slots in step.state.items():
        was = kept[name]
        if "P" not in slots:
            assert all(torch.equal(slots[k], was[k]) for k in slots), f"{name} is none of its business"
            continue
        assert not torch.equal(slots["P"], was["P"]) and not slots.get("B", torch.zeros(1)).any()
        assert all(t.is_contiguous() for t in slots.values())
        m, v, t = slots["exp_avg"], slots["exp_avg_sq"], slots["step"]
        if moments == "reset":
            assert not m.any() and not v.any() and not t.any() and not slots["bias_correction"].any()
        else:
            assert torch.equal(v, was["exp_avg_sq"]) and t == PERIOD
            turned = carried(was["exp_avg"], was["P"], slots["P"]) if moments == "transform" else was["exp_avg"]
            torch.testing.assert_close(m, turned.float())
    for i in range(2):
        q, k, o, gate, up = (
            step.state[f"model.layers.{i}.{n}_proj.weight"]["P"]
            for n in ("self_attn.q", "self_attn.k", "self_attn.o", "mlp.gate", "mlp.up")
        )
        assert (q is k) == (gate is up) == torch.equal(q, k) == torch.equal(gate, up) == bool(share)
        assert not torch.equal(q, o)
    blocks = [step.state[f"model.layers.{i}.self_attn.q_proj.weight"]["P"] for i in range(2)]
    assert not torch.equal(*blocks)


@each_form
def test_a_turn_of_parts_is_the_turn_of_the_whole(form):
    step = make(llama(2), form, options={"share": SHARED})
    run(step, PERIOD)
    optimizer, names = step.optimizer, list(step.params)
    params, state = optimizer.switch(step.params, step.state, PERIOD, Key(5))
    for own in (names[:9], names[9:]):
        some = {n: step.params[n] for n in own}
        p, s = optimizer.switch(some, {n: step.state[n] for n in own}, PERIOD, Key(5))
        assert list(p) == own and list(s) == own
        for n in own:
            assert torch.equal(p[n], params[n])
            assert all(torch.equal(s[n][k], state[n][k]) for k in state[n])
    assert all(step.params[n] is p for n, p in params.items()) == (form == "merged"), "merged weights stay as they are"


@each_form
def test_decay_multiplies_the_weight(form):
    """And not B: with a gradient of zero W shrinks by lr wd a step, whatever B is."""
    w = randn(6, 5)
    params = {"x.weight": w}
    base = partition(params, [Group("rso", sgd(0.0), ("",), LR, DECAY)])
    optimizer = rso(base, params, params, 3, form=form)
    state = optimizer.init(params)
    if form == "products":
        state["x.weight"]["B"] = randn(6, 3, seed=1)
    moved, new = update(optimizer, {"x.B": torch.zeros(6, 3)}, state, params, hypers(optimizer))
    torch.testing.assert_close(moved["x.weight"], w * (1 - LR * DECAY))
    assert form == "merged" or torch.equal(new["x.weight"]["B"], state["x.weight"]["B"])


@each_form
def test_the_prox_term_is_b_over_eta(form):
    params, prox = {"x.weight": randn(6, 5)}, 0.7
    base = partition(params, [Group("rso", sgd(0.0), ("",), LR)])
    optimizer = rso(base, params, params, 3, form=form, prox=prox)
    state, b, g = optimizer.init(params), torch.zeros(6, 3), randn(6, 3, seed=1)
    moved = params
    for _ in range(3):
        moved, state = update(optimizer, {"x.B": g}, state, moved, hypers(optimizer))
        b = descend(b, g, LR, prox)
    torch.testing.assert_close(state["x.weight"]["B"], b.float())
    whole = moved if form == "merged" else merge(moved, state)
    torch.testing.assert_close(whole["x.weight"], merged(params["x.weight"], state["x.weight"]["P"], b).float())


@each_form
@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_after_a_new_p_the_inner_rule_warms_up(form, moments):
    """Over two steps of every three, as if its rate alone were scheduled; decay has the whole rate all the time."""

    def moved(rates: list[float], decay: float, **options) -> tuple[Tensor, State]:
        params = {"x.weight": randn(6, 5)}
        base = partition(params, [Group("rso", sgd(0.9), ("",), LR, decay)])
        optimizer = rso(base, params, params, 3, PERIOD, form=form, moments=moments, **options)
        state = optimizer.init(params)
        for i, rate in enumerate(rates):
            if optimizer.switches(i):
                params, state = optimizer.switch(params, state, i, Key(0))
            own = hypers(optimizer, LR * rate)
            params, state = update(optimizer, {"x.B": randn(6, 3, seed=i)}, state, params, own)
        return optimizer.merge(params, state)["x.weight"], state

    warm, state = moved([1.0] * 7, 0.0, warmup=2)
    scheduled, plain = moved([0.5, 1, 1, 0.5, 1, 1, 0.5], 0.0)
    torch.testing.assert_close(warm, scheduled, rtol=0, atol=1e-6)
    assert float(state["x.weight"]["age"]) == 1 and "age" not in plain["x.weight"]
    decayed, _ = moved([1.0] * 7, DECAY, warmup=2)
    assert 0.9 < float((decayed - warm).norm() / (7 * LR * DECAY * warm.norm())) < 1.1


def test_a_parked_weight_has_nothing_to_merge():
    """It was merged when it froze: the tensor stays the same object, which is not written a second time."""
    w, slots = randn(6, 4), {"P": randn(4, 2), "B": torch.zeros(6, 2)}
    assert merge({"x.weight": w}, {"x.weight": slots})["x.weight"] is not w
    assert merge({"x.weight": w}, {"x.weight": Parked(slots, {1: False})})["x.weight"] is w
