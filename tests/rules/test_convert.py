"""State that moves to another rule: what is exact, what is estimated, and that the next update does not jump."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers.grids import few

from optimizers.apply import refresh, update
from optimizers.contract import Group, Optimizer, Params, Rule, State
from optimizers.convert import Row, _update, convert
from optimizers.moments import complete
from optimizers.partition import partition
from optimizers.random import fold, normal
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import adagrad_sn, adam_sn, rmsprop_sn, snsm
from optimizers.rules.sumo import sumo
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

RULES: dict[str, Rule] = {
    "adamw": adamw(),
    "sgd": sgd(),
    "galore": galore(rank=6, scale=1.0),
    "snsm": snsm(rank=6),
    "snsm topk": snsm(rank=6, proj_type="topk"),
    "adam_sn": adam_sn(),
    "adagrad_sn": adagrad_sn(),
    "rmsprop_sn": rmsprop_sn(),
}
HYPER = {"all": {"lr": torch.tensor(1e-3), "weight_decay": torch.tensor(0.0)}}
SHAPES = {"tall": (20, 12), "wide": (12, 20)}
PARAMS: Params = {name: normal(fold(0, name), shape) for name, shape in SHAPES.items()}


def optimizer(rule: Rule) -> Optimizer:
    return partition(PARAMS, [Group("all", rule, ("",), 1e-3)], staggered=False)


def trained(made: Optimizer, steps: int = 60) -> State:
    """State after `steps` noisy gradients around a matrix of rank 4, with rows of different sizes."""
    state, params = made.init(PARAMS), PARAMS
    means = {}
    for name, (m, n) in SHAPES.items():
        low = normal(fold(1, name), (m, 4)) @ normal(fold(2, name), (4, n))
        means[name] = low * torch.linspace(0.2, 2, m)[:, None]
    for t in range(steps):
        grads = {name: mean + 0.5 * normal(fold(3, name, t), mean.shape) for name, mean in means.items()}
        state, _ = refresh(made, grads, state, t, fold(4))
        params, state = update(made, grads, state, params, HYPER)
    return state


def swapped(old: str, new: str) -> tuple[State, list[Row]]:
    source, target = optimizer(RULES[old]), optimizer(RULES[new])
    return convert(PARAMS, trained(source), source, target, 60, fold(5))


FAST = zip(RULES, [*list(RULES)[1:], *list(RULES)[:1]], strict=True)  # each gives once and takes over once


@pytest.mark.parametrize("pair", few(list(product(RULES, RULES)), *FAST), ids=" to ".join)
def test_every_pair_goes_on_without_a_jump(pair):
    old, new = pair
    state, rows = swapped(old, new)
    fresh = optimizer(RULES[new]).init(PARAMS)
    assert {n: {s: (t.shape, t.dtype) for s, t in slots.items()} for n, slots in state.items()} == {
        n: {s: (t.shape, t.dtype) for s, t in slots.items()} for n, slots in fresh.items()
    }
    assert all(t.isfinite().all() and t.is_contiguous() for slots in state.values() for t in slots.values())
    adaptive = "sgd" not in (old, new) and "adagrad_sn" not in (old, new)
    for row in rows:
        assert row.source == RULES[old].name and row.target == RULES[new].name
        if adaptive and "rmsprop_sn" not in (old, new) and ("sn" in old) == ("sn" in new):
            assert 0.4 < row.jump < 2.5, row
        assert math.isfinite(row.jump) or old == "rmsprop_sn"


@pytest.mark.parametrize("name", ["adamw", "sgd", "adam_sn", "adagrad_sn", "rmsprop_sn"])
def test_a_rule_takes_over_its_own_state_exactly(name):
    source = optimizer(RULES[name])
    state = trained(source)
    got, rows = convert(PARAMS, state, source, optimizer(RULES[name]), 60, fold(5))
    assert all(torch.equal(got[n][s], t) for n, slots in state.items() for s, t in slots.items())
    assert all(row.did == "kept" for row in rows)


@pytest.mark.parametrize(("old", "new"), [("adamw", "adamw"), ("adamw", "snsm"), ("sgd", "adamw"), ("snsm", "sgd")])
def test_what_is_converted_stays_with_whoever_gave_it(old, new):
    source, target = optimizer(RULES[old]), optimizer(RULES[new])
    state = trained(source)
    before = {n: {s: t.clone() for s, t in slots.items()} for n, slots in state.items()}
    got, _ = convert(PARAMS, state, source, target, 60, fold(5))
    assert all(torch.equal(t, before[n][s]) for n, slots in state.items() for s, t in slots.items())
    given, made = ({t.data_ptr() for slots in part.values() for t in slots.values()} for part in (state, got))
    assert not given & made


@pytest.mark.parametrize("form", ["merged", "products"])
def test_what_layers_share_stays_one_tensor(form):
    """The state comes in the order of the parameters, whatever is converted first."""
    params = {f"l.{name}.weight": normal(fold(0, name), (12, 20)) for name in "qok"}

    def of(rule: Rule) -> Optimizer:
        base = partition(params, [Group("all", rule, ("",), 1e-3)], staggered=False)
        return rso(base, params, params, 4, form=form, share=[("q", "k")])

    plain = partition(params, [Group("all", adamw(), ("",), 1e-3)], staggered=False)
    for source, target in ((plain, of(adamw())), (of(adamw()), of(adamw()))):
        got, _ = convert(params, source.init(params, 3), source, target, 3, fold(5))
        assert list(got) == list(params)
        assert got["l.q.weight"]["P"] is got["l.k.weight"]["P"] is not got["l.o.weight"]["P"]


@pytest.mark.parametrize(
    "rule", [adamw(), sgd(), sgd(nesterov=True), adam_sn(second="coordinate")], ids=lambda r: r.name
)
def test_an_update_in_pieces_is_the_update(rule):
    """Of a tensor of more than one piece, and of one whose size is that of a scalar's slots."""
    assert rule.elementwise
    for shape in ((100, 130), (2,)):
        p, g = normal(fold(0, "p"), shape), normal(fold(0, "g"), shape)
        slots = {k: t + 0.5 for k, t in rule.init(p).items()}
        whole = replace(rule, elementwise=False)
        assert _update(rule, slots, g, p) == pytest.approx(_update(whole, slots, g, p), rel=1e-12)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (sgd(0.9), sgd(0.99)),
        (sgd(0.9), sgd(0.5, nesterov=True)),
        (muon(0.9), muon(0.99)),
        (sumo(6, momentum=0.9), sumo(6, momentum=0.99)),
        (snsm(6, betas=(0.9, 0.999)), snsm(6, betas=(0.95, 0.99))),
        (adamw((0.9, 0.999)), adamw((0.8, 0.95))),
        (adam_sn(subset="heuristic"), adam_sn(subset="sqrt")),
        (galore(6), galore(6, betas=(0.8, 0.99))),
    ],
    ids=lambda rule: rule.name,
)
def test_other_settings_are_converted_and_say_the_same(old, new):
    """What the state stands for, a gradient's moments, stays; what it is stored as belongs to the settings."""
    source, target = optimizer(old), optimizer(new)
    state = trained(source)
    got, rows = convert(PARAMS, state, source, target, 60, fold(5))
    for row in rows:
        p = PARAMS[row.name]
        before, after = old.export(state[row.name], p), new.export(got[row.name], p)
        assert float((after.first - before.first).norm() / before.first.norm()) < 0.05, row
    if old.name == "sgd":
        for n in PARAMS:
            factor = (1 - old.options.momentum) / (1 - new.options.momentum)
            expected = state[n]["momentum_buffer"] * factor
            torch.testing.assert_close(got[n]["momentum_buffer"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["grad", "update"])
@pytest.mark.parametrize("rule", [adamw(), sgd()], ids=lambda rule: rule.name)
def test_one_run_has_one_scale(rule, mode):
    """From 2 of 6 layers to 3 of 6: what is active in both takes the new scale, and its moments are of that size."""
    params = {f"layers.{i}.w": PARAMS["tall"].clone() for i in range(6)}
    base = partition(params, [Group("all", rule, ("",), 1e-3)])
    two, three = (
        omgd(base, params, traversal(layers(params), fold(1), active=active, period=100), mode) for active in (2, 3)
    )
    state = two.init(params)
    names = list(state)
    for t in range(20):
        grads = {n: normal(fold(3, n, t), (20, 12)) + 1 for n in names}
        _, state = update(two, grads, state, params, HYPER)
    got, _ = convert(params, state, two, three, 20, fold(5))
    assert {float(slots["scale"]) for slots in got.values()} == {2.0}
    both = [n for n in names if n in got]
    assert both
    for n in both:
        before, after = (made.owner[n].rule.export(s[n], params[n]) for made, s in ((two, state), (three, got)))
        torch.testing.assert_close(after.first, before.first, rtol=1e-4, atol=1e-6)
    again, rows = convert(params, state, two, two, 20, fold(5))
    assert all(row.did == "kept" for row in rows)
    assert all(torch.equal(again[n][k], t) for n, slots in state.items() for k, t in slots.items())


def test_subset_sums_are_exact():
    """A second moment per entry becomes one per row or column without loss, and the first one stays as it was."""
    source = optimizer(RULES["adamw"])
    before = trained(source)
    after, rows = convert(PARAMS, before, source, optimizer(RULES["adam_sn"]), 60, fold(5))
    for name, dim in (("tall", 1), ("wide", 0)):
        expected = before[name]["exp_avg_sq"].sum(dim, keepdim=True)
        torch.testing.assert_close(after[name]["exp_avg_sq"], expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(after[name]["exp_avg"], before[name]["exp_avg"], rtol=1e-5, atol=1e-7)
    assert all(abs(row.first_kept - 1) < 1e-5 and abs(row.second_kept - 1) < 1e-5 for row in rows)


def test_a_subspace_keeps_what_lies_in_it():
    """The mean gradient has rank 4: rank 6 keeps nearly all of it, and on the way back nothing more is lost."""
    source, target = optimizer(RULES["adamw"]), optimizer(RULES["snsm"])
    state, rows = convert(PARAMS, trained(source), source, target, 60, fold(5))
    assert all(0.97 < row.first_kept <= 1.0001 for row in rows), rows
    _, rows = convert(PARAMS, state, target, source, 60, fold(5))
    assert all(abs(row.first_kept - 1) < 1e-4 for row in rows), rows


def test_between_ranks():
    source = optimizer(snsm(rank=6))
    state = trained(source)
    kept = {}
    for rank in (2, 6, 10):
        _, rows = convert(PARAMS, state, source, optimizer(snsm(rank=rank)), 60, fold(5))
        kept[rank] = min(row.first_kept for row in rows)
    assert kept[2] < 0.95 < kept[6] <= 1.0001 and abs(kept[6] - 1) < 1e-4 and abs(kept[10] - 1) < 1e-4, kept


def test_what_was_never_learned_is_reset():
    source, target = optimizer(RULES["adamw"]), optimizer(RULES["snsm"])
    state, rows = convert(PARAMS, source.init(PARAMS), source, target, 0, fold(5))
    assert all("nothing was learned" in row.did and math.isnan(row.jump) for row in rows)
    for slots in state.values():
        assert not slots["exp_avg"].any() and not slots["exp_avg_sq"].any() and not slots["step"]
        torch.testing.assert_close(slots["basis"].mT @ slots["basis"], torch.eye(6), rtol=0, atol=1e-5)


def test_a_guessed_second_moment_has_no_empty_entries():
    first = torch.zeros(4, 5)
    first[0], first[:, 0] = 1.0, 1.0
    made = complete(optimizer(RULES["sgd"]).owner["tall"].rule.export({"momentum_buffer": first * 10}, first))
    assert made.second is not None and (made.second > 0).all()


@pytest.mark.parametrize("name", ["adamw", "snsm", "galore", "sgd"])
def test_what_was_frozen_starts_from_rest(name):
    """Layer 1 has no state: its first updates are no larger than those of layer 0, which knows its gradients."""
    params = {f"layers.{i}.w": PARAMS["tall"].clone() for i in (0, 1)}

    def of(rule: Rule) -> Optimizer:
        return partition(params, [Group("all", rule, ("",), 1e-3)], staggered=False)

    source, target = of(RULES["adamw"]), of(RULES[name])
    known = {"layers.0.w": trained(optimizer(RULES["adamw"]))["tall"]}
    state, rows = convert(params, known, source, target, 60, fold(5))
    assert "of its like" in {row.name: row.did for row in rows}["layers.1.w"]
    g = 0.5 * normal(fold(3, "next"), (20, 12))
    moved, _ = update(target, dict.fromkeys(params, g), state, params, HYPER)
    sizes = [float((moved[n] - p).norm()) for n, p in params.items()]
    assert sizes[1] < 1.5 * sizes[0], sizes
