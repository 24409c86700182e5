"""State under masks: what is dropped, kept and built anew, and that a run goes on from any step."""

from itertools import pairwise

import pytest
import torch
from helpers.masks import DECAY, EPS, KEY, KINDS, LR, everything, make, named, run
from helpers.models import copied, llama
from torch import Tensor

from engine import checkpoint
from models.llama import Llama
from optimizers.contract import Group, Optimizer, Rule
from optimizers.partition import partition
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.state import parked_by, trains
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    describe,
    layers,
    traversal,
)


def over_matrices(params: dict[str, Tensor], rule: Rule) -> Optimizer:
    """The rule on matrices of layers, AdamW on the rest."""
    return partition(
        params, [Group("all", rule, ("_proj",), LR, DECAY), Group("rest", adamw(eps=EPS), ("",), LR, DECAY)]
    )


# State: what is held (f), what is fresh, and that it can be saved at any step (g).


TURNING = {
    "adamw, drop": (adamw(eps=EPS), "layers", "drop"),
    "adamw, keep": (adamw(eps=EPS), "layers", "keep"),
    "sgd, offload": (sgd(), "layers", "offload"),
    "adamw, tensors": (adamw(eps=EPS), "tensors", "drop"),
    "adamw, coordinates": (adamw(eps=EPS), "coordinates", "drop"),
    "lisa": (adamw(eps=EPS), "lisa", "drop"),
    "snsm, drop": (snsm(4, 3), "layers", "drop"),
    "snsm, keep": (snsm(4, 3), "layers", "keep"),
    "galore, offload": (galore(4, 3, moments="rotate"), "layers", "offload"),
    "muon, tensors by size": (muon(), "tensors by size", "drop"),
    "adamw, rising, drop": (adamw(eps=EPS), "layers", "drop"),
    "snsm, rising, keep": (snsm(4, 3), "layers", "keep"),
    "lisa, rising, offload": (adamw(eps=EPS), "lisa", "offload"),
    "adamw, rising, coordinates": (adamw(eps=EPS), "coordinates", "drop"),
}


def masked_in(case: str, model: Llama) -> Optimizer:
    rule, kind, policy = TURNING[case]
    params = dict(model.named_parameters())
    base = (everything if kind == "coordinates" else over_matrices)(params, rule)
    return omgd(base, params, KINDS[kind](params), "grad", policy, 3 if "rising" in case else 0)


@pytest.mark.run
@pytest.mark.parametrize("case", TURNING)
def test_a_run_goes_on_from_every_step_of_two_cycles_to_the_bit(tmp_path, case):
    """From every checkpoint one step leads to the next one, to the bit; so what is resumed anywhere ends the same."""
    steps = 13
    model = llama(3)
    optimizer = masked_in(case, model)
    step = make(model, optimizer)
    for i in range(steps):
        checkpoint.save(tmp_path, i, step.params, step.state, {}, {}, optimizer.metadata)
        run(step, i, i + 1)
    checkpoint.save(tmp_path, steps, step.params, step.state, {}, {}, optimizer.metadata)
    saved = [checkpoint.load(tmp_path / f"step-{i:08d}") for i in range(steps + 1)]
    for i, (one, after) in enumerate(pairwise(saved)):
        model = llama(3)
        again = make(model, masked_in(case, model))
        expected = again.optimizer.init(again.params, i)
        assert list(one.state) == list(expected)
        for key, slots in expected.items():
            kinds = {slot: (t.shape, t.dtype) for slot, t in slots.items()}
            assert {slot: (t.shape, t.dtype) for slot, t in one.state[key].items()} == kinds, key
            assert parked_by(slots) == parked_by(one.state[key]), key
        checkpoint.restore_into(again.params, one.params)
        again.state.clear()
        again.state |= copied(one.state)
        run(again, i, i + 1)
        assert all(p.equal(after.params[name]) for name, p in again.params.items()), i
        assert list(again.state) == list(after.state)
        for key, slots in after.state.items():
            assert slots.keys() == again.state[key].keys()
            assert all(t.equal(again.state[key][slot]) for slot, t in slots.items()), (i, key)
        assert describe(one.header, one.params, i) == describe(again.optimizer.metadata, again.params, i)


def test_what_is_dropped_starts_anew_and_what_is_kept_goes_on():
    ends = {}
    for policy in ("drop", "keep", "offload"):
        model = llama(2)
        params = dict(model.named_parameters())
        masks = traversal(layers(params), KEY, active=1, period=3, reshuffle=False)
        step = run(make(model, omgd(everything(params, adamw()), params, masks, "grad", policy)), 0, 8)
        (active,) = masks.active(7)
        own = f"model.layers.{active}.mlp.up_proj.weight"
        ends[policy] = step.state[own]["step"].item()
        other = f"model.layers.{1 - active}.mlp.up_proj.weight"
        assert not trains(step.state, other)
        by = {"drop": {}, "keep": {1: False}, "offload": {1: True}}[policy]
        assert parked_by(step.state.get(other, {})) == by
        assert step.state["lm_head.weight"]["step"] == 8, "always active, never dropped"
    assert ends == {"drop": 2, "keep": 5, "offload": 5}


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_a_basis_is_built_at_the_first_step_and_after_a_refresh_was_missed(policy):
    params = named(4) | {f"layers.{i}.w": torch.zeros(8, 8) for i in range(4)}
    base = partition(params, [Group("low", galore(2, 5), ("layers",), LR), Group("rest", sgd(), ("",), LR)], False)
    masks = traversal(layers(params), KEY, active=1, period=2, reshuffle=False)
    optimizer = omgd(base, params, masks, "grad", policy)
    order = [masks.active(2 * j)[0] for j in range(4)]
    trains = {step: f"layers.{order[step // 2 % 4]}.w" for step in range(24)}
    rebuilt = [step for step in range(24) if trains[step] in optimizer.due(step)]
    assert set(range(0, 24, 2)) <= set(rebuilt), "each returns after 6 steps, more than a gap"
    assert set(rebuilt) == set(range(0, 24, 2)) | {5, 15}
    long = partition(params, [Group("low", galore(2, 100), ("layers",), LR), Group("rest", sgd(), ("",), LR)], False)
    optimizer = omgd(long, params, masks, "grad", policy)
    rebuilt = [step for step in range(24) if trains[step] in optimizer.due(step)]
    assert rebuilt == ([0, 2, 4, 6] if policy == "keep" else list(range(0, 24, 2)))


def test_bases_are_never_empty_while_they_are_used():
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=1, period=2)
    step = make(model, omgd(over_matrices(params, galore(4, 50)), params, masks))
    for i in range(16):
        before = {name: p.detach().clone() for name, p in step.params.items()}
        run(step, i, i + 1)
        for name, slots in step.state.items():
            if "basis" in slots:
                gram = slots["basis"].mT @ slots["basis"]
                torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-5)
                assert not step.params[name].equal(before[name])
