"""Masks by gradient norm: the draw, what it is drawn from, and that a run with them goes on to the bit."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers.models import copied
from helpers.runs import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import checkpoint
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from models.llama import Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Params, UsageError
from optimizers.convert import convert
from optimizers.partition import partition
from optimizers.random import Key, fold, word
from optimizers.rules.adamw import adamw
from optimizers.rules.snsm import snsm
from optimizers.state import parked_by, trains
from optimizers.wrappers.choice import describe
from optimizers.wrappers.norms import draw, norm_masks
from optimizers.wrappers.omgd import Omgd, omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import coordinates, layers, traversal

SHAPE = LlamaConfig(32, 16, 24, 5, 2, max_position_embeddings=16)
LAYERS, PERIOD, ACTIVE, WARMUP = 5, 3, 2, 0
MATRICES = r"_proj\.weight$"


def masked(base: Optimizer, params: Params, policy: str = "drop", **options) -> Omgd:
    masks = norm_masks(layers(params), Key(4), **{"active": ACTIVE, "period": PERIOD} | options)
    return omgd(base, params, masks, "none", policy)


def plain(params: Params, rule=None) -> Optimizer:
    return partition(params, [Group("main", rule or adamw(), (MATRICES,), 0.01), Group("rest", adamw(), ("",), 0.01)])


def uniform(base: Optimizer, params: Params, policy: str = "drop") -> Omgd:
    masks = traversal(layers(params), Key(2), active=3, period=2)
    return omgd(base, params, masks, "none", policy)


def low(base: Optimizer, params: Params, form: str) -> Optimizer:
    return rso(base, params, [n for n in params if "_proj" in n], 4, 4, Key(7), form)


MADE = {
    "adamw": lambda p: masked(plain(p), p),
    "adamw, keep": lambda p: masked(plain(p), p, "keep"),
    "adamw, offload, warm-up": lambda p: masked(plain(p), p, "offload", mask_warmup=2),
    "snsm": lambda p: masked(plain(p, snsm(4, 4)), p),
    "snsm, keep": lambda p: masked(plain(p, snsm(4, 4)), p, "keep"),
    "over rso, merged": lambda p: masked(low(plain(p), p, "merged"), p),
    "over rso, products, keep": lambda p: masked(low(plain(p), p, "products"), p, "keep"),
    "rso, products, over them": lambda p: low(masked(plain(p), p), p, "products"),
    "over a traversal, keep": lambda p: masked(uniform(plain(p), p, "keep"), p, "keep"),
    "under a traversal": lambda p: uniform(masked(plain(p), p), p),
    "over themselves": lambda p: masked(masked(plain(p), p, active=4, period=2), p),
}


def make(name: str, seed: int = 0, **options) -> Step:
    model = Llama(SHAPE, seed=seed)
    if options.pop("bf16", False):
        model.to(torch.bfloat16)
    params = dict(model.named_parameters())
    optimizer = MADE[name](params)
    if "rso" in name:
        form = "merged" if "merged" in name else "products"
        attach(model, [n for n in params if "_proj" in n], 4, form)
    return Step(cut(model), params, optimizer, optimizer.init(params), mode="off", key=Key(5), **options)


def batch(t: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(t))
    return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def train(step: Step, first: int, last: int) -> list[dict[int, float]]:
    """Steps [first, last); of each the squared gradient norm of every layer that trained."""
    seen = []
    for t in range(first, last):
        step.switch(t)
        found: Counter[int] = Counter()
        for names, squares in step([batch(t)], step=t).squares:
            for name, square in zip(names, squares.tolist(), strict=True):
                if ".layers." in name:
                    found[int(name.split(".")[2])] += square
        seen.append(dict(found))
    return seen


# The draw.


def by_hand(key: Key, v: list[float], never: list[bool], count: int) -> list[int]:
    """The definition, one draw after another: the first to ring of exponential clocks, the never visited before."""
    left = list(range(len(v)))
    ring = {i: -math.log((word(key, i) + 2**31 + 0.5) / 2**32) / (1.0 if never[i] else v[i] ** 0.5) for i in left}
    chosen = []
    for _ in range(count):
        among = [i for i in left if never[i]] or left
        chosen.append(min(among, key=ring.__getitem__))
        left.remove(chosen[-1])
    return sorted(chosen)


def test_what_is_chosen_in_a_run_follows_from_the_norms_that_it_saw():
    """All of a run's masks, from its gradient norms, in plain Python."""
    step = make("adamw")
    v, never, chosen, total, times = [0.0] * LAYERS, [True] * LAYERS, None, Counter(), Counter()
    for t in range(6 * PERIOD):
        if t % PERIOD == 0:
            for i in times:
                mean = total[i] / times[i]
                v[i], never[i] = (mean if never[i] else 0.5 * v[i] + 0.5 * mean), False
            total, times = Counter(), Counter()
            chosen = by_hand(fold(Key(4), "norms", t), v, never, ACTIVE)
        (seen,) = train(step, t, t + 1)
        assert sorted(seen) == chosen, t
        total.update(seen)
        times.update(seen.keys())
        assert step.state["masks:1"]["norms"].dtype == torch.float32
    assert not any(never)
    torch.testing.assert_close(
        step.state["masks:1"]["scores"], torch.tensor(v, dtype=torch.float64), rtol=1e-5, atol=0.0
    )


def test_chances_are_proportional_to_the_norms():
    scores = [1.0, 4.0, 16.0, 0.0, math.inf]
    first = Counter(i for k in range(4000) for i, one in enumerate(draw(Key(k), scores, [1] * 5, 1)) if one)
    assert set(first) == {0, 1, 2}, "what has no finite norm comes last"
    for i, share in enumerate((1 / 7, 2 / 7, 4 / 7)):
        assert first[i] / 4000 == pytest.approx(share, abs=0.03)  # four deviations
    second = Counter(i for k in range(4000) for i, one in enumerate(draw(Key(k), scores, [1] * 5, 2)) if one)
    share = 1 / 7 + 2 / 7 * 1 / 5 + 4 / 7 * 1 / 3  # without replacement: first, or second after one of the others
    assert second[0] / 4000 == pytest.approx(share, abs=0.03)
    assert draw(Key(1), scores, [1, 1, 1, 0, 0], 2) == [False, False, False, True, True], "those never visited first"


def test_everything_is_visited_before_anything_returns():
    step = make("adamw")
    seen = [set(one) for one in train(step, 0, 2 * PERIOD)[::PERIOD]]
    assert not seen[0] & seen[1]
    third = set(train(step, 2 * PERIOD, 2 * PERIOD + 1)[0])
    assert set(range(LAYERS)) - seen[0] - seen[1] <= third


@pytest.mark.run
def test_another_process_chooses_the_same():
    code = (
        "from optimizers.wrappers.norms import draw; from optimizers.random import Key; import json;"
        "print(json.dumps([draw(Key(k), [0.3, 7.0, 1e-9, 2.5], [1, 1, 1, 1], 2) for k in range(50)]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [draw(Key(k), [0.3, 7.0, 1e-9, 2.5], [1, 1, 1, 1], 2) for k in range(50)]


# What a run does with it.


OTHERS = ({"recompute": True}, {"bf16": True, "stochastic_rounding": True})
RUNS = [(name, {}) for name in MADE] + [
    (n, options) for n in ("adamw", "over rso, products, keep") for options in OTHERS
]


@pytest.mark.run
@pytest.mark.parametrize(("name", "options"), RUNS, ids=str)
def test_a_run_goes_on_from_every_step_of_two_periods_to_the_bit(name, options, tmp_path):
    step, last = make(name, **options), 2 * PERIOD + 2
    for t in range(last):
        path = checkpoint.save(tmp_path, t, step.params, step.state, {}, {}, step.optimizer.metadata)
        train(step, t, t + 1)
        saved, again = checkpoint.load(path), make(name, seed=9, **options)
        shared = {key: saved.state[key] for key in again.optimizer.shared}
        expected = again.optimizer.init(again.params, t, shared)
        assert list(expected) == list(saved.state)
        for key, slots in expected.items():
            assert {s: (x.shape, x.dtype) for s, x in slots.items()} == {
                s: (x.shape, x.dtype) for s, x in saved.state[key].items()
            }
            assert parked_by(slots) == parked_by(saved.state[key]), (t, key)
        checkpoint.restore_into(again.params, saved.params)
        again.state.clear()
        again.state.update(copied(saved.state))
        train(again, t, t + 1)
        assert all(torch.equal(p, again.params[n]) for n, p in step.params.items()), t
        assert list(step.state) == list(again.state)
        for key, slots in step.state.items():
            assert all(torch.equal(x, again.state[key][s]) for s, x in slots.items()), (t, key)


class Reads(TorchDispatchMode):
    """Counts what the host asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default) and (
            func is torch.ops.aten._local_scalar_dense.default or "device" in (kwargs or {})
        )
        return func(*args, **(kwargs or {}))


def test_a_step_asks_a_device_for_nothing(monkeypatch):
    """And a switch asks once, whatever the number of layers: for the norms. What is on the host is no question."""
    step, asked = make("adamw"), []
    was = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (asked.append(tuple(self.shape)), was(self))[1])
    for t in range(2 * PERIOD + 1):
        asked.clear()
        step.switch(t)
        norms = [shape for shape in asked if shape == (2, LAYERS)]
        assert len(norms) == (t > 0 and t % PERIOD == 0), t
        with Reads() as reads:
            step([batch(t)], step=t)
        assert reads.count == 0, t


def test_a_layer_that_another_mask_froze_counts_as_not_visited():
    step = make("under a traversal")
    seen = train(step, 0, 4 * PERIOD)
    times = Counter(i for one in seen[: 3 * PERIOD] for i in one)
    assert step.state["masks:1"]["visits"].tolist() == [times[i] for i in range(LAYERS)]


def test_where_it_stands_is_told_before_the_switch():
    step = make("adamw")
    for t in range(4 * PERIOD):
        told = describe(step.optimizer.metadata, step.params, t, step.state)
        json.dumps(told)
        before = Counter(told["visits"])
        (seen,) = train(step, t, t + 1)
        assert told["active"] == [f"model.layers.{i}" for i in sorted(seen)] and told["step"] == t % PERIOD
        after = describe(step.optimizer.metadata, step.params, t + 1, step.state)["visits"]
        assert Counter(after) - before == Counter(told["active"])
    trained = sum(p.numel() for n, p in step.params.items() if trains(step.state, n))
    assert told["trainable"] == pytest.approx(trained / sum(p.numel() for p in step.params.values()))
    assert all(score > 0 for score in told["scores"].values())


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_state_is_taken_over_to_and_from_it(policy):
    params = dict(Llama(SHAPE, seed=0).named_parameters())
    target, whole = masked(plain(params), params, policy), plain(params)
    old = whole.init(params)
    for slots in old.values():
        slots["exp_avg"] += 0.5
    there, rows = convert(params, old, whole, target, 7, Key(0))
    assert list(there) == list(target.init(params, 7)) and {row.name for row in rows} == there.keys() - {"masks:1"}
    assert any((slots["exp_avg"] == 0.5).all() for n, slots in there.items() if ".layers." in n)
    back, rows = convert(params, there, target, whole, 7, Key(0))
    assert list(back) == list(old) and {row.name for row in rows} == old.keys()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda p: omgd(plain(p), p, norm_masks(layers(p), Key(0), active=1, period=1)),
            "got scale_mode 'grad'",
        ),
        (lambda p: uniform(masked(plain(p), p), p, "keep"), "got state_policy 'keep' over them, expected 'drop'"),
        (
            lambda p: norm_masks(coordinates(p), Key(0), active=1, period=1),
            "got entries to choose among",
        ),
        (lambda p: norm_masks(layers(p), Key(0), active=6, period=1), "active: got 6 of 5 layers"),
        (lambda p: norm_masks(layers(p), Key(0), active=1, period=0), "got 0 and 0 steps; give at least 1 and 0"),
        (lambda p: norm_masks(layers(p), Key(0), active=1, period=1, memory=1.0), "memory: got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(UsageError, match=says):
        make(dict(Llama(SHAPE, seed=0).named_parameters()))
