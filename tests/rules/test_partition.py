"""Who owns which parameter, and when what is owned is rebuilt."""

import pytest
import torch
from helpers.matrices import copied, randn, same
from hypothesis import given
from hypothesis import strategies as st

from optimizers.apply import refresh
from optimizers.contract import Group, Rule, UsageError
from optimizers.partition import partition, route, stagger
from optimizers.random import Key
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import adam_snsm


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
