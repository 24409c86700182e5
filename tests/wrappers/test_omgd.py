"""Mask traversal: what masks sum to, what stands still, what is held in memory, and that runs go on from any step."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import batches, distance, few_tokens, graphs, llama, rate
from helpers.runs import corpus, here, refused
from helpers.texts import prepared
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from engine import checkpoint
from engine.data import Batches, Tokens
from engine.memory import counted_peak
from engine.step import backward
from engine.step.segments import cut
from engine.step.step import Step
from models.llama import Llama
from optimizers.contract import PARKED, Group, Optimizer, Rule, UsageError, state_bytes
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    Groups,
    Traversal,
    coordinates,
    describe,
    duration,
    gives_up,
    layers,
    tensors,
    traversal,
)
from recipes import omgd as recipe
from recipes import omgd_toy as toys

ROOT = Path(__file__).resolve().parents[2]
LR, DECAY, EPS, KEY = 1e-2, 0.1, 1e-4, Key(3)
slow = pytest.mark.slow


def everything(params: dict[str, Tensor], rule: Rule) -> Optimizer:
    """One rule for all."""
    return partition(params, [Group("all", rule, ("",), LR, DECAY)])


def over_matrices(params: dict[str, Tensor], rule: Rule) -> Optimizer:
    """The rule on matrices of layers, AdamW on the rest."""
    return partition(
        params, [Group("all", rule, ("_proj",), LR, DECAY), Group("rest", adamw(eps=EPS), ("",), LR, DECAY)]
    )


def hypers(optimizer: Optimizer, step: int, decay: float = DECAY) -> dict[str, dict[str, Tensor]]:
    """What the trainer gives to every group."""
    one = {"lr": torch.tensor(rate(step)), "weight_decay": torch.tensor(decay)}
    return {group.name: one for group in optimizer.owner.values()}


def make(model: Llama, optimizer: Optimizer, **options) -> Step:
    params = dict(model.named_parameters())
    options = dict(mode="off", logits=97 * 8, key=KEY) | options
    return Step(cut(model), params, optimizer, optimizer.init(params), **options)


def run(step: Step, first: int, last: int, accumulation: int = 1, decay: float = DECAY) -> Step:
    for i in range(first, last):
        step.turn(i)
        step(batches(step.optimizer.batch(i), accumulation), hypers(step.optimizer, i, decay), i)
    return step


def named(count: int, size: int = 1) -> dict[str, Tensor]:
    """A model of `count` layers and something outside of them."""
    return {f"layers.{i}.w": torch.zeros(size) for i in range(count)} | {"head": torch.zeros(size)}


# What masks sum to (a), and what they visit (b).


def summed(optimizer: Optimizer, masks: Traversal, params: dict[str, Tensor], cycle: int) -> dict[str, Tensor]:
    """The sum of a cycle's masks, scale and all, for every entry of every parameter."""
    total = {name: torch.zeros(p.numel()) for name, p in params.items()}
    for j in range(masks.masks):
        step = masks.warmup + cycle * masks.length + j * masks.period
        for name, slots in optimizer.init(params, step + 1).items():
            entries = slots["entries"].long() if "entries" in slots else slice(None)
            total[name][entries] += slots.get("scale", torch.tensor(1.0))
    return total


@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_masks_of_layers_sum_to_their_number_everywhere(count, active, period, warmup, reshuffle):
    params = named(count)
    if active > count:
        active = count
    masks = traversal(layers(params), KEY, active=active, period=period, mask_warmup=warmup, reshuffle=reshuffle)
    assert masks.masks == -(-count // active)
    optimizer = omgd(everything(params, sgd()), params, masks)
    for cycle in (0, 1, 7):
        for name, total in summed(optimizer, masks, params, cycle).items():
            assert total == masks.masks, name
        sizes = [len(masks.members(cycle, j)) for j in range(masks.masks)]
        assert sizes == [active] * (masks.masks - 1) + [count - active * (masks.masks - 1)]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.floats(0.01, 1.0), st.booleans())
def test_masks_of_tensors_sum_to_their_number_and_are_balanced(sizes, keep, by_elements):
    params = {f"w{i}": torch.zeros(size) for i, size in enumerate(sizes)} | {"head": torch.zeros(2)}
    chosen = tensors(params, ("^w",), "numel" if by_elements else "count")
    if keep < 1 / len(sizes):
        with pytest.raises(UsageError, match="keep at least"):
            traversal(chosen, KEY, keep=keep, period=1)
        return
    masks = traversal(chosen, KEY, keep=keep, period=1)
    assert masks.masks == np.ceil(1 / keep - 1e-9)
    optimizer = omgd(everything(params, sgd()), params, masks)
    for cycle in (0, 1):
        assert all((total == masks.masks).all() for total in summed(optimizer, masks, params, cycle).values())
        parts = [masks.members(cycle, j) for j in range(masks.masks)]
        assert all(parts)
        if by_elements:
            weights = [sum(sizes[i] for i in part) for part in parts]
            assert max(weights) <= sum(sizes) / masks.masks + max(sizes)
        else:
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(5, 40), st.sampled_from([1.0, 0.5, 0.4, 0.3, 0.2]))
def test_masks_of_coordinates_sum_to_their_number(size, keep):
    params = {"a": torch.zeros(size), "b": torch.zeros(3, 5), "head": torch.zeros(2)}
    masks = traversal(coordinates(params, ("^a", "^b")), KEY, keep=keep, period=2, mask_warmup=3)
    optimizer = omgd(everything(params, adamw()), params, masks)
    for cycle in (0, 1):
        assert all((total == masks.masks).all() for total in summed(optimizer, masks, params, cycle).values())
    held = [optimizer.init(params, 3 + 2 * j + 1)["b"] for j in range(masks.masks)]
    assert {len(slots["exp_avg"]) for slots in held} <= {15 // masks.masks, -(-15 // masks.masks)}
    assert all(slots["exp_avg"].shape == slots["entries"].shape for slots in held)


def test_masks_change_from_cycle_to_cycle_unless_they_are_fixed():
    params = named(12)
    for reshuffle in (True, False):
        masks = traversal(layers(params), KEY, active=3, period=1, reshuffle=reshuffle)
        cycles = {tuple(masks.active(4 * cycle + j) for j in range(4)) for cycle in range(10)}
        assert len(cycles) == (10 if reshuffle else 1)
    other = traversal(layers(params), Key(4), active=3, period=1)
    assert [other.active(t) for t in range(8)] != [masks.active(t) for t in range(8)]


def test_algorithm_2_skips_the_layers_that_a_cycle_has_left():
    masks = traversal(layers(named(7)), KEY, active=3, period=1, remainder="reset")
    assert masks.masks == 2 and masks.scale == pytest.approx(7 / 3)
    visits = Counter(i for t in range(2000) for i in masks.active(t))
    assert all(len(masks.active(t)) == 3 for t in range(20))
    assert max(Counter([*masks.active(10), *masks.active(11)]).values()) == 1
    assert all(abs(visits[i] / 2000 - 3 / 7) < 0.05 for i in range(7))
    one = traversal(layers(named(5)), KEY, active=3, period=1, remainder="reset")
    assert any(one.turns(t) for t in range(1, 9)), "one mask a cycle, and another in each"


@pytest.mark.parametrize(("order", "epochs", "warmup"), [("epochwise", 1, 0), ("joint", 1, 1), ("epochwise", 2, 1)])
def test_each_pair_of_a_mask_and_a_window_comes_equally_often_in_every_cycle(tmp_path, order, epochs, warmup):
    data, size = Batches(Tokens(prepared(tmp_path, "some words " * 90)), 24, seed=5, align=4), 4
    epoch = data.epoch // size
    assert data.windows % size, "epochs whose last batch is filled up"
    masks = traversal(layers(named(5)), KEY, active=2, period=epochs * epoch, order=order, mask_warmup=warmup * epoch)
    for cycle in range(2):
        start = masks.warmup + cycle * masks.length
        pairs: Counter[tuple[int, int]] = Counter()
        for step in range(start, start + masks.length):
            windows = [int(k) for k in data.which(masks.batch(step) * size, size) if k >= 0]
            pairs.update((group, window) for group in masks.active(step) for window in windows)
        assert pairs == {(group, window): epochs for group in range(5) for window in range(data.windows)}
        switches = sum(masks.turns(step) for step in range(start + 1, start + masks.length))
        assert switches == 2 if order == "epochwise" else switches > 10


@pytest.mark.parametrize(
    ("period", "warmup", "says"), [(7, 0, "held for 7 steps"), (20, 5, "begin at step 5"), (20, 10, "")]
)
def test_a_period_that_is_no_whole_pass_says_what_it_gives_up(period, warmup, says):
    masks = traversal(layers(named(4)), KEY, active=2, period=period, mask_warmup=warmup)
    assert says in gives_up(masks, 10) and bool(says) == bool(gives_up(masks, 10))
    assert not gives_up(traversal(layers(named(4)), KEY, active=2, period=7, replacement=True), 10)


def test_durations_are_steps_or_epochs():
    assert [duration(text, 40) for text in ("1epoch", "3epochs", "100step", "7 steps")] == [40, 120, 100, 7]
    for wrong in ("1", "epoch", "1.5epoch", "-1step", "2week"):
        with pytest.raises(UsageError, match="expected a whole number and a unit"):
            duration(wrong, 40)


# Over a cycle, at a point (d).


@pytest.mark.parametrize(("kind", "order", "policy"), [
    ("coordinates", "epochwise", "drop"), ("coordinates", "joint", "keep"), ("layers", "epochwise", "drop"),
    ("layers", "joint", "keep"),
])  # fmt: skip
def test_masked_gradients_of_a_cycle_sum_to_those_of_every_mask_and_sample(kind, order, policy):
    n, draw = 8, torch.Generator().manual_seed(0)
    params = {f"layers.{i}.w": torch.randn(7, generator=draw) for i in range(5)} | {"b": torch.randn(7, generator=draw)}
    data = torch.randn(n, 6, 7, generator=draw)
    chosen = layers(params) if kind == "layers" else coordinates(params, ("layers",))
    amount = {"active": 2} if kind == "layers" else {"keep": 0.4}
    masks = traversal(chosen, KEY, **amount, period=n, order=order)
    optimizer = omgd(everything(params, sgd(0.0)), params, masks, "grad", policy)
    one = {"all": {"lr": torch.tensor(1.0), "weight_decay": torch.tensor(0.0)}}

    def gradients(i: int) -> dict[str, Tensor]:
        """Of sum_j (x_ij . w_j)^2 over tensors j."""
        return {name: 2 * (x @ p) * x for (name, p), x in zip(params.items(), data[i], strict=True)}

    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(masks.length):
        state = optimizer.init(params, step + 1)
        grads = {name: g for name, g in gradients(masks.batch(step) % n).items() if name in state}
        moved, _ = optimizer.update(grads, state, params, one)
        for name in total:
            total[name] += params[name] - moved[name]
    for name, p in total.items():
        full = sum(gradients(i)[name] for i in range(n))
        torch.testing.assert_close(p, masks.masks * full, rtol=1e-5, atol=1e-4)


# One mask is no mask (c).


@pytest.mark.parametrize("mode", ["grad", "none", "update"])
@pytest.mark.parametrize(("kind", "amount"), [
    (layers, {"active": 3}), (tensors, {"keep": 1.0}), (coordinates, {"keep": 1.0})
])  # fmt: skip
def test_one_mask_is_the_base_optimizer_to_the_bit(kind, amount, mode):
    model, masked = llama(3), llama(3)
    params = dict(model.named_parameters())
    base = everything(params, adamw(eps=EPS))
    masks = traversal(kind(params), KEY, **amount, period=2)
    assert masks.masks == 1
    plain = run(make(model, base), 0, 5)
    step = run(make(masked, omgd(base, params, masks, mode)), 0, 5)
    assert all(p.equal(plain.params[name]) for name, p in step.params.items())


# What is frozen stands still (e), what is clipped is clipped first, and accumulation changes nothing (k).

KINDS: dict[str, Callable[[dict[str, Tensor]], Traversal]] = {
    "layers": lambda params: traversal(layers(params), KEY, active=1, period=2),
    "tensors": lambda params: traversal(tensors(params), KEY, keep=0.5, period=2),
    "tensors by size": lambda params: traversal(tensors(params, balance="numel"), KEY, keep=0.3, period=2),
    "coordinates": lambda params: traversal(coordinates(params), KEY, keep=0.3, period=2),
    "lisa": lambda params: traversal(layers(params), KEY, active=1, period=2, replacement=True),
}


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
@pytest.mark.parametrize("rule", [adamw(), sgd()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_stands_still(kind, rule, policy):
    model = llama(3)
    params = dict(model.named_parameters())
    masks = KINDS[kind](params)
    if kind == "coordinates" and policy != "drop":
        with pytest.raises(UsageError, match="embed_tokens.weight: masks of coordinates hold the state of active entr"):
            omgd(everything(params, rule), params, masks, "grad", policy)
        return
    step = make(model, omgd(everything(params, rule), params, masks, "grad", policy))
    for i in range(8):
        step.turn(i)
        before = {name: p.detach().clone() for name, p in step.params.items()}
        parked = {
            key: {slot: t.clone() for slot, t in slots.items()}
            for key, slots in step.state.items()
            if key.startswith(PARKED)
        }
        result = step(batches(i), hypers(step.optimizer, i), i)
        trained = {name for names, _ in result.squares for name in names}
        assert trained == {name for name in step.params if name in step.state}
        for name, p in step.params.items():
            moved = p.detach() != before[name]
            if name not in trained:
                assert not moved.any(), name
            elif kind == "coordinates":
                entries = step.state[name]["entries"].long()
                rest = torch.ones(p.numel(), dtype=torch.bool).index_fill(0, entries, False)
                assert not moved.flatten()[rest].any(), name
                assert moved.flatten()[entries].any()
            else:
                assert moved.any(), name
        for key, slots in parked.items():
            assert all(t.equal(step.state[key][slot]) for slot, t in slots.items()), key
        assert bool(parked) == (policy != "drop")


def test_an_entry_that_is_frozen_keeps_even_the_sign_of_its_zero():
    params = {"w": torch.full((8,), -0.0)}
    masks = traversal(coordinates(params), KEY, keep=0.5, period=1)
    optimizer = omgd(everything(params, sgd()), params, masks)
    state = optimizer.init(params)
    moved, _ = optimizer.update({"w": torch.ones(8)}, state, params, hypers(optimizer, 0))
    assert (moved["w"] < 0).sum() == 4
    assert torch.signbit(moved["w"]).all()


def test_clipping_comes_before_the_scale():
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=1, period=2)
    step = make(model, omgd(everything(params, sgd(0.0)), params, masks), clip="tensor", clip_norm=1e-3)
    before = {name: p.detach().clone() for name, p in step.params.items()}
    step(batches(0), hypers(step.optimizer, 0, 0.0), 0)
    for name in step.state:
        factor = 4 if "layers" in name else 1
        assert (step.params[name] - before[name]).norm().item() == pytest.approx(factor * LR * 1e-3, rel=1e-2), name


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_make_the_step_of_their_union(recompute):
    ends = []
    for whole in (True, False):
        model = llama(3)
        params = dict(model.named_parameters())
        masks = traversal(layers(params), KEY, active=1, period=2)
        step = make(model, omgd(everything(params, adamw(eps=EPS)), params, masks), recompute=recompute)
        for i in range(7):
            data = batches(i, 3)
            union = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
            step.turn(i)
            step([union] if whole else data, hypers(step.optimizer, i), i)
        ends.append(step.params)
    assert distance(ends[0], ends[1]) < 1e-4


# The scale: nearly nothing to Adam, everything to SGD (i).


def after(rule: Rule, mode: str, steps: int = 8) -> dict[str, Tensor]:
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=1, period=2)
    return run(make(model, omgd(everything(params, rule), params, masks, mode)), 0, steps).params


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((p - b[name]).norm().item() / p.norm().item() for name, p in a.items() if ".layers." in name)


def test_adam_does_not_feel_the_scale_of_gradients_and_sgd_does():
    start = dict(llama(4).named_parameters())
    assert apart(after(adamw(), "grad"), after(adamw(), "none")) < 1e-3 * apart(after(adamw(), "none"), start)
    assert apart(after(sgd(), "grad"), after(sgd(), "none")) > 0.3 * apart(after(sgd(), "none"), start)
    assert apart(after(adamw(), "update"), after(adamw(), "none")) > apart(after(adamw(), "none"), start)


def test_the_scale_is_one_until_the_masks_begin():
    params = named(4)
    masks = traversal(layers(params), KEY, active=2, period=3, mask_warmup=2)
    optimizer = omgd(everything(params, adamw()), params, masks)
    state = optimizer.init(params)
    assert state.keys() == params.keys() and all(state[f"layers.{i}.w"]["scale"] == 1 for i in range(4))
    assert [optimizer.turns(t) for t in range(8)] == [False, False, True, False, False, True, False, False]
    _, state = optimizer.turn(params, state, 2, KEY)
    assert len(state) == 3 and {float(slots.get("scale", torch.tensor(0.0))) for slots in state.values()} == {0.0, 2.0}
    assert optimizer.init(params, 3).keys() == state.keys() and len(optimizer.init(params, 2)) == 5


# As their code does it; and LISA (l).


def by_hand(model: nn.Module, masks: Traversal, scale: float, steps: int, drop: bool) -> dict[str, Tensor]:
    """torch.optim.AdamW with gradients switched on and off; `drop` forgets the state of what is switched off."""
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=LR, eps=EPS, weight_decay=DECAY)
    middle = [[p for name, p in params.items() if f"layers.{i}." in name] for i in range(len(masks.groups.labels))]
    for step in range(steps):
        for i, own in enumerate(middle):
            for p in own:
                p.requires_grad_(i in masks.active(step))
                if drop and not p.requires_grad:
                    optimizer.state.pop(p, None)
        (data,) = batches(step)
        optimizer.zero_grad(set_to_none=True)
        logits = model(data["input_ids"]).flatten(0, 1)
        cross_entropy(logits, data["targets"].flatten(), ignore_index=-100).backward()
        for i in masks.active(step):
            for p in middle[i]:
                p.grad *= scale
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return params


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
@pytest.mark.parametrize("replacement", [False, True], ids=["traversal", "lisa"])
def test_steps_are_those_of_torch_with_gradients_switched_on_and_off(replacement, policy):
    model, reference = llama(4), llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=2, period=2, replacement=replacement)
    assert any(set(masks.active(t)) & set(masks.active(t + 2)) for t in range(0, 12, 2)), "some stay at a turn"
    mode = "none" if replacement else "grad"
    step = run(make(model, omgd(everything(params, adamw(eps=EPS)), params, masks, mode, policy)), 0, 13)
    expected = by_hand(reference, masks, 1.0 if replacement else 2.0, 13, policy == "drop")
    assert distance(step.params, expected) < 1e-4


def test_with_replacement_masks_are_independent_and_uniform():
    masks = traversal(layers(named(6)), KEY, active=2, period=3, replacement=True)
    drawn = [masks.active(3 * k) for k in range(6000)]
    assert all(masks.active(3 * k + 2) == drawn[k] for k in range(50)), "held for a period"
    pairs = Counter(drawn)
    assert len(pairs) == 15 and all(abs(count - 400) < 100 for count in pairs.values())
    repeats = sum(len(set(a) & set(b)) for a, b in zip(drawn[1:], drawn, strict=False)) / 5999
    assert abs(repeats - 2 * 2 / 6) < 0.05
    assert masks.scale == 3
    assert traversal(tensors(named(6), ("layers",)), KEY, keep=0.4, period=1, replacement=True).scale == 3


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
}


def turning(case: str, model: Llama) -> Optimizer:
    rule, kind, policy = TURNING[case]
    params = dict(model.named_parameters())
    base = (everything if kind == "coordinates" else over_matrices)(params, rule)
    return omgd(base, params, KINDS[kind](params), "grad", policy)


@pytest.mark.run
@pytest.mark.parametrize("case", TURNING)
def test_a_run_goes_on_from_every_step_of_two_cycles_to_the_bit(tmp_path, case):
    steps = 13
    model = llama(3)
    optimizer = turning(case, model)
    step = make(model, optimizer)
    for i in range(steps):
        checkpoint.save(tmp_path, i, step.params, step.state, {}, {}, optimizer.about)
        run(step, i, i + 1)
    for i in range(steps):
        saved = checkpoint.load(tmp_path / f"step-{i:08d}")
        model = llama(3)
        again = make(model, turning(case, model))
        expected = again.optimizer.init(again.params, i)
        assert list(saved.state) == list(expected)
        for key, slots in expected.items():
            kinds = {slot: (t.shape, t.dtype) for slot, t in slots.items()}
            assert {slot: (t.shape, t.dtype) for slot, t in saved.state[key].items()} == kinds, key
        checkpoint.restore_into(again.params, saved.params)
        again.state.clear()
        again.state |= {key: {slot: t.clone() for slot, t in slots.items()} for key, slots in saved.state.items()}
        run(again, i, steps)
        assert all(p.equal(step.params[name]) for name, p in again.params.items()), i
        assert list(again.state) == list(step.state)
        for key, slots in step.state.items():
            assert slots.keys() == again.state[key].keys()
            assert all(t.equal(again.state[key][slot]) for slot, t in slots.items()), (i, key)
        assert describe(saved.header, saved.params, i) == describe(again.optimizer.about, again.params, i)


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
        assert other not in step.state
        assert (PARKED + other in step.state) == (policy != "drop")
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


@pytest.mark.run
def test_two_processes_choose_the_same_masks():
    code = (
        "from optimizers.wrappers.traversal import *; from optimizers.random import Key; import torch, json;"
        "p = {f'layers.{i}.w': torch.zeros(i + 3, 4) for i in range(11)};"
        "a = traversal(layers(p), Key(5), active=4, period=3);"
        "b = traversal(tensors(p, balance='numel'), Key(5), keep=0.3, period=2, replacement=True);"
        "c = traversal(coordinates(p), Key(5), keep=0.5, period=3, order='joint');"
        "print(json.dumps([[a.active(t), b.active(t), c.entries('layers.2.w', 20, t).tolist(), c.batch(t)]"
        " for t in range(40)]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and len(json.loads(said[0])) == 40


# Memory, counted.

SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=64)


def held(step: Step) -> int:
    return sum(map(state_bytes, step.state.values()))


def masked(layers_active: int | None, **options) -> Step:
    """Twelve blocks, all or some of them active at a time."""
    model = llama(12, **SIZES)
    params = dict(model.named_parameters())
    base = everything(params, adamw())
    if layers_active is None:
        return make(model, base, **options)
    return make(model, omgd(base, params, traversal(layers(params), KEY, active=layers_active, period=2)), **options)


def text(count: int, length: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.arange(count * length).view(count, length) % 64
    return [{"input_ids": ids, "targets": ids}]


def test_state_is_that_of_the_active_set_before_and_after_two_cycles():
    step = masked(3)
    everything_ = dict(step.params)
    active = sum(p.numel() for n, p in everything_.items() if ".layers." not in n)
    active += sum(p.numel() for n, p in everything_.items() if ".layers.0." in n) * 3
    for i in range(17):
        step.turn(i)
        step(few_tokens(1), hypers(step.optimizer, i), i)
        scalars = sum(4 + 16 + (4 if "scale" in slots else 0) for slots in step.state.values())  # clock, scale
        assert held(step) == 8 * active + scalars, i
        assert held(step) < 0.4 * held(masked(None)), "of all"


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_one_active_segment_at_a_time(recompute):
    step = masked(3)
    trainable, frozen = step.optimizer.view(step.params, step.state)
    for name, p in step.params.items():
        p.requires_grad_(name in trainable)
    seen: list[dict[str, Tensor]] = []
    pass_ = backward.recomputed if recompute else backward.stored
    with step.chain.draws.of(KEY):
        pass_(step.chain, step.params, few_tokens(1), torch.tensor(1.0), lambda grads: seen.append(dict(grads)))
    assert {name for grads in seen for name in grads} == set(trainable) and not set(trainable) & set(frozen)
    assert sum(map(bool, seen)) == 5, "embedding, head and three blocks"
    most = max(sum(g.numel() for g in grads.values()) for grads in seen)
    assert most == sum(p.numel() for name, p in step.params.items() if ".layers.0." in name)


def peak(step: Step, data: list[dict[str, Tensor]]) -> int:
    for i in range(2):
        step(data, hypers(step.optimizer, i), i)
    return counted_peak(lambda: step(data, hypers(step.optimizer, 2), 2))


def test_a_step_holds_no_gradient_of_what_is_frozen_and_fewer_activations():
    block = 4 * sum(p.numel() for name, p in masked(None).params.items() if ".layers.0." in name)
    assert peak(masked(3, recompute=True), few_tokens(1)) < 3 * block, "a block's gradients, temporaries of an update"
    full, some = (peak(masked(active), text(8)) for active in (None, 3))
    assert some < 0.80 * full, some / full


def test_no_backward_below_the_lowest_segment_that_trains():
    model = llama(6, **SIZES)
    params = dict(model.named_parameters())
    top = ("model.norm.weight", "lm_head.weight")
    groups = Groups("layers", ("top", "rest"), (top, tuple(name for name in params if name not in top)))
    masks = traversal(groups, KEY, active=1, period=1, reshuffle=False)
    step = make(model, omgd(everything(params, adamw()), params, masks))
    head, rest = (next(t for t in (2, 3) if masks.active(t) == (i,)) for i in (0, 1))
    peaks, losses = {}, {}
    for i in range(4):
        step.turn(i)
        peaks[i] = counted_peak(lambda i=i: losses.update({i: step(text(8), hypers(step.optimizer, i), i).loss}))
        lowest = step.chain.lowest(step.view())
        assert lowest == (step.chain.last if masks.active(i) == (0,) else 0)
    assert peaks[head] < 0.3 * peaks[rest]
    assert all(loss.isfinite() for loss in losses.values())


# Compilation.


@pytest.mark.compiles
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=slow)])
def test_a_change_of_mask_never_recompiles(recompute):
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=3, period=1)  # a mask of three layers, one of one
    step = make(model, omgd(everything(params, adamw()), params, masks), mode="segments", recompute=recompute)
    torch._dynamo.reset()
    counters.clear()
    numbers = []
    for i in range(20):
        run(step, i, i + 1)
        numbers.append(graphs())
    assert len({masks.active(i) for i in range(20)}) > 6
    forwards = 7 if recompute else 4  # embedding, block twice, head; all but the head also without gradients
    assert numbers[0] == numbers[-1] == forwards + 3, "and an update of each"


@pytest.mark.compiles
@slow
@pytest.mark.parametrize("kind", ["layers", "coordinates"])
def test_compiled_equals_uncompiled(kind):
    ends = []
    for mode in ("off", "segments"):
        model = llama(3)
        params = dict(model.named_parameters())
        step = make(model, omgd(everything(params, adamw(eps=EPS)), params, KINDS[kind](params)), mode=mode)
        ends.append(run(step, 0, 9).params)
    assert distance(ends[0], ends[1]) < 1e-4


# What cannot be done is named.

MATRIX = {"layers.0.w": torch.zeros(8, 8), "layers.1.w": torch.zeros(8, 8), "b": torch.zeros(8)}


def low(params: dict[str, Tensor]) -> Optimizer:
    return partition(params, [Group("low", galore(2), ("layers",), LR), Group("rest", sgd(), ("",), LR)])


@pytest.mark.parametrize(("make_", "named_"), [
    (lambda: layers(MATRIX, r"blocks\.(\d+)\."), r"layer pattern .*blocks.* matches no parameter"),
    (lambda: layers(MATRIX, r"layers\.\d+\."), "expected one group of digits"),
    (lambda: layers(MATRIX, r"(layers)\."), "expected one group of digits"),
    (lambda: tensors(MATRIX, ("conv",)), "mask pattern 'conv' matches no parameter"),
    (lambda: coordinates(MATRIX, ("layers", "conv")), "mask pattern 'conv'"),
    (lambda: traversal(layers(MATRIX), KEY, active=3, period=1), "active: got 3 of 2 layers"),
    (lambda: traversal(layers(MATRIX), KEY, active=0, period=1), "active: got 0"),
    (lambda: traversal(layers(MATRIX), KEY, period=1), "give one of the two"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, keep=0.5, period=1), "give one of the two"),
    (lambda: traversal(tensors(MATRIX), KEY, keep=1.5, period=1), "keep: got 1.5"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, period=0), "period and mask_warmup: got 0"),
    (lambda: traversal(coordinates(MATRIX), KEY, active=1, period=1), "expected keep"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, period=1, replacement=True, order="joint"), "replacement"),
    (lambda: traversal(tensors(MATRIX), KEY, keep=0.5, period=1, remainder="reset"), "Algorithm 2"),
    (lambda: omgd(everything(MATRIX, sgd()), MATRIX, traversal(layers(MATRIX), KEY, active=1, period=1, order="joint")),
     "got state_policy 'drop', expected 'keep'"),
    (lambda: omgd(low(MATRIX), MATRIX, traversal(coordinates(MATRIX, ("layers",)), KEY, keep=0.5, period=1)),
     "layers.0.w: masks of coordinates leave vectors, but galore needs a matrix"),
    (lambda: omgd(everything(MATRIX, muon()), MATRIX, traversal(coordinates(MATRIX, ("1",)), KEY, keep=0.5, period=1)),
     "layers.1.w .*muon needs a matrix"),
    (lambda: omgd(everything(MATRIX, sgd()), MATRIX, traversal(coordinates(MATRIX, ("b",)), KEY, keep=0.1, period=1)),
     "b: 8 entries cannot be split over 10 masks"),
])  # fmt: skip
def test_what_cannot_be_done_is_named(make_, named_):
    with pytest.raises(UsageError, match=named_):
        make_()


def test_names_of_wrapped_models_find_their_layers():
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        params = {f"{prefix}model.layers.{i}.w": torch.zeros(2) for i in (0, 2, 10)} | {f"{prefix}norm": torch.zeros(2)}
        found = layers(params, r"^model\.layers\.(\d+)\.")
        assert found.labels == ("model.layers.0", "model.layers.2", "model.layers.10")
        assert [own for (own,) in found.names] == [name for name in params if "layers" in name]
    inner = {f"encoder._orig_mod.layer.{i}.w": torch.zeros(2) for i in range(2)}
    assert layers(inner, r"^encoder\.layer\.(\d+)\.").labels == ("encoder.layer.0", "encoder.layer.1")


def test_a_head_of_a_checkpoint_says_where_a_run_is():
    params = named(4, 10)
    masks = traversal(layers(params), KEY, active=2, period=3, mask_warmup=2)
    about = omgd(everything(params, sgd()), params, masks).about
    assert all(isinstance(value, str) for value in about.values())
    now = describe(about, params, 9)
    assert (now["cycle"], now["mask"], now["masks"], now["step"]) == (1, 0, 2, 1)
    assert now["active"] == [f"layers.{i}" for i in masks.active(9)] == now["order"][0]
    assert sorted(label for mask in now["order"] for label in mask) == [f"layers.{i}" for i in range(4)]
    assert now["trainable"] == pytest.approx(3 / 5)
    assert sorted(now["visits"].values()) == [5, 5, 6, 6]
    assert describe(about, params, 0)["active"] == [f"layers.{i}" for i in range(4)]
    small = traversal(coordinates(params, ("layers",)), KEY, keep=0.5, period=3)
    assert describe(omgd(everything(params, sgd()), params, small).about, params, 4)["trainable"] == pytest.approx(0.6)
    json.dumps(now)


# The recipe: memory, the toy (h), flags.


def test_seven_billion_parameters_take_what_the_paper_says():
    rows = recipe.memory(recipe.Memory(active=(2,)))
    gib = {name: [round(figure / 2**30, 2) for figure in row[:3]] for name, row in rows.items()}
    assert gib["AdamW"] == [12.55, 12.55, 25.10]
    assert gib["OMGD, 2 of 32 layers"] == [12.55, 1.24, 2.48]
    assert gib["GaLore, rank 128"] == [12.55, 12.55, 1.73]
    ours = rows["OMGD, 2 of 32 layers"]
    assert ours.segment < 0.31 * ours.gradients and ours.state == pytest.approx(2 * ours.moments, rel=1e-5)


def test_the_toy_tells_masks_of_a_traversal_from_masks_drawn_every_step(tmp_path):
    out = tmp_path / "toy"
    done = here(tmp_path, f"omgd toy --steps 20000 --seeds 6 --samples 200 --out {out}")
    assert done.code == 0, done.err
    found = json.loads((out / "toy.json").read_text())["rates"]
    assert (out / "toy.png").stat().st_size > 10_000
    assert all(way in done.out for way in toys.WAYS)
    for way in ("no mask", "wor, epochwise", "wor, joint"):
        assert found[way]["slope"] <= -1.8, found
    for way in ("iid, per step", "projection, per step"):
        assert -1.3 <= found[way]["slope"] <= -0.7, found
        assert found[way]["late"] > 15 * found["wor, epochwise"]["late"]
    assert found["iid, per epoch"]["late"] < 2 * found["wor, epochwise"]["late"]
    assert "--steps must be at least 20 epochs" in refused(here(tmp_path, "omgd toy --steps 10"), 2)


@slow
def test_the_toy_at_full_size(tmp_path):
    found = toys.toy(toys.Toy(steps=100_000, seeds=16, out=tmp_path))
    for way in ("wor, epochwise", "wor, joint"):
        assert found[way].slope <= -1.8
        assert found["iid, per step"].late > 15 * found[way].late
    assert -1.3 <= found["iid, per step"].slope <= -0.7
    assert found["wor, epochwise"].late == pytest.approx(2 * found["no mask"].late, rel=0.25)
    assert found["iid, per epoch"].late == pytest.approx(found["wor, epochwise"].late, rel=0.25)


@pytest.mark.run
def test_a_run_says_what_its_masks_give_up(tmp_path):
    tiny = (
        "omgd pretrain --data corpus.txt --sequence 16 --micro-batch 2 --steps 20 --size.hidden-size 16 "
        "--size.intermediate-size 24 --size.num-hidden-layers 4 --size.num-attention-heads 2 --dry-run "
    )
    corpus(tmp_path)
    done = here(tmp_path, tiny + "--active 2 --period 3step")
    assert done.code == 0 and "4 layers to choose from, 2 masks a cycle, each held for 3 steps" in done.out
    assert "a mask is held for 3 steps, and a pass over the data is" in done.err
    assert "the run ends 2 steps into a cycle of 6" in done.err
    whole = here(tmp_path, tiny + "--active 2 --period 1epoch")
    assert "samples are not paired" not in whole.err and "the run ends 20 steps into a cycle" in whole.err
    for flags, says in (
        ("--active 5", "active: got 5 of 4 layers"),
        ("--by tensors", "expected off"),
        ("--period 3", "expected a whole number and a unit"),
        ("--order joint", "expected 'keep'"),
        ("--by coordinates --over muon", "muon needs a matrix"),
    ):
        assert says in refused(here(tmp_path, tiny + flags), 2)
    lisa = here(tmp_path, tiny.replace("omgd pretrain", "baseline --optimizer lisa") + "--active 1 --period 5step")
    assert lisa.code == 0, lisa.err
