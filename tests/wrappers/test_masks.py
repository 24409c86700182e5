"""Masks: what a cycle of them sums to and visits, when they change, what a checkpoint's head says of them."""

import contextlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.masks import KEY, everything, named
from helpers.texts import prepared
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.data import Batches, Tokens
from optimizers.contract import Optimizer, UsageError
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    Traversal,
    coordinates,
    describe,
    duration,
    gives_up,
    layers,
    tensors,
    traversal,
)

ROOT = Path(__file__).resolve().parents[2]


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
    assert any(one.switches(t) for t in range(1, 9)), "one mask a cycle, and another in each"


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
        switches = sum(masks.switches(step) for step in range(start + 1, start + masks.length))
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


# As their code does it; and LISA (l).


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
    environment = {"PYTHONHASHSEED": "1", "PATH": ""}
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE).stdout
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(code, {})
    assert json.loads(other) == json.loads(here.getvalue()) and len(json.loads(other)) == 40


# What cannot be done is named.


def test_a_head_of_a_checkpoint_says_where_a_run_is():
    params = named(4, 10)
    masks = traversal(layers(params), KEY, active=2, period=3, mask_warmup=2)
    metadata = omgd(everything(params, sgd()), params, masks).metadata
    assert all(isinstance(value, str) for value in metadata.values())
    now = describe(metadata, params, 9)
    assert (now["cycle"], now["mask"], now["masks"], now["step"]) == (1, 0, 2, 1)
    assert now["active"] == [f"layers.{i}" for i in masks.active(9)] == now["order"][0]
    assert sorted(label for mask in now["order"] for label in mask) == [f"layers.{i}" for i in range(4)]
    assert now["trainable"] == pytest.approx(3 / 5)
    assert sorted(now["visits"].values()) == [5, 5, 6, 6]
    assert describe(metadata, params, 0)["active"] == [f"layers.{i}" for i in range(4)]
    small = traversal(coordinates(params, ("layers",)), KEY, keep=0.5, period=3)
    assert describe(omgd(everything(params, sgd()), params, small).metadata, params, 4)["trainable"] == pytest.approx(
        0.6
    )
    json.dumps(now)
