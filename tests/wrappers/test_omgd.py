"""Steps under masks: what stands still, what is clipped and scaled, and that they are the steps of plain PyTorch."""

import pytest
import torch
from helpers.grids import covering, few
from helpers.masks import DECAY, EPS, KEY, KINDS, LR, everything, hypers, make, named, run
from helpers.models import batches, distance, graphs, llama, rate
from reference.omgd import adamw_by_hand, cycle_of_gradients
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

from optimizers.apply import update
from optimizers.contract import Rule, UsageError
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd
from optimizers.state import Parked, trains
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    coordinates,
    layers,
    tensors,
    traversal,
)

slow = pytest.mark.slow


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
        grads = {name: g for name, g in gradients(masks.batch(step) % n).items() if trains(state, name)}
        moved, _ = update(optimizer, grads, state, params, one)
        for name in total:
            total[name] += params[name] - moved[name]
    expected = cycle_of_gradients([gradients(i) for i in range(n)], masks.masks)
    for name, p in total.items():
        torch.testing.assert_close(p, expected[name].float(), rtol=1e-5, atol=1e-4)


# One mask is no mask (c).


WHOLE = [(layers, {"active": 3}), (tensors, {"keep": 1.0}), (coordinates, {"keep": 1.0})]


@pytest.mark.parametrize(("all_of", "mode"), covering(WHOLE, ["grad", "none", "update"]))
def test_one_mask_is_the_base_optimizer_to_the_bit(all_of, mode):
    kind, amount = all_of
    model, masked = llama(3), llama(3)
    params = dict(model.named_parameters())
    base = everything(params, adamw(eps=EPS))
    masks = traversal(kind(params), KEY, **amount, period=2)
    assert masks.masks == 1
    plain = run(make(model, base), 0, 5)
    step = run(make(masked, omgd(base, params, masks, mode)), 0, 5)
    assert all(p.equal(plain.params[name]) for name, p in step.params.items())


# What is frozen stands still (e), what is clipped is clipped first, and accumulation changes nothing (k).


BASES = {"adamw": adamw(), "sgd": sgd()}


@pytest.mark.parametrize(("kind", "base", "policy"), covering(KINDS, BASES, ["drop", "keep", "offload"]))
def test_what_is_frozen_stands_still(kind, base, policy):
    rule = BASES[base]
    model = llama(3)
    params = dict(model.named_parameters())
    masks = KINDS[kind](params)
    if kind == "coordinates" and policy != "drop":
        with pytest.raises(UsageError, match="embed_tokens.weight: masks of coordinates hold the state of active entr"):
            omgd(everything(params, rule), params, masks, "grad", policy)
        return
    step = make(model, omgd(everything(params, rule), params, masks, "grad", policy))
    for i in range(8):
        step.switch(i)
        before = {name: p.detach().clone() for name, p in step.params.items()}
        parked = {
            key: {slot: t.clone() for slot, t in slots.items()}
            for key, slots in step.state.items()
            if isinstance(slots, Parked)
        }
        result = step(batches(i), hypers(step.optimizer, i), i)
        trained = {name for names, _ in result.squares for name in names}
        assert trained == {name for name in step.params if trains(step.state, name)}
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
    moved, _ = update(optimizer, {"w": torch.ones(8)}, state, params, hypers(optimizer, 0))
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
            step.switch(i)
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
    adam, descent = after(adamw(), "none"), after(sgd(), "none")
    assert apart(after(adamw(), "grad"), adam) < 1e-3 * apart(adam, start)
    assert apart(after(sgd(), "grad"), descent) > 0.3 * apart(descent, start)
    assert apart(after(adamw(), "update"), adam) > apart(adam, start)


def test_the_scale_is_one_until_the_masks_begin():
    params = named(4)
    masks = traversal(layers(params), KEY, active=2, period=3, mask_warmup=2)
    optimizer = omgd(everything(params, adamw()), params, masks)
    state = optimizer.init(params)
    assert state.keys() == params.keys() and all(state[f"layers.{i}.w"]["scale"] == 1 for i in range(4))
    assert [optimizer.switches(t) for t in range(8)] == [False, False, True, False, False, True, False, False]
    _, state = optimizer.switch(params, state, 2, KEY)
    assert len(state) == 3 and {float(slots.get("scale", torch.tensor(0.0))) for slots in state.values()} == {0.0, 2.0}
    assert optimizer.init(params, 3).keys() == state.keys() and len(optimizer.init(params, 2)) == 5


# As their code does it; and LISA (l).


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


@pytest.mark.run
@pytest.mark.parametrize(
    ("replacement", "policy", "rising"), covering([False, True], ["drop", "keep", "offload"], [0, 3])
)
def test_steps_are_those_of_torch_with_gradients_switched_on_and_off(replacement, policy, rising):
    model, reference = llama(4), llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=2, period=2, replacement=replacement)
    assert any(set(masks.active(t)) & set(masks.active(t + 2)) for t in range(0, 12, 2)), "some stay at a switch"
    mode = "none" if replacement else "grad"
    step = run(make(model, omgd(everything(params, adamw(eps=EPS)), params, masks, mode, policy, rising)), 0, 13)
    options = dict(scale=1.0 if replacement else 2.0, steps=13, forget=policy == "drop", eps=EPS, decay=DECAY)
    options |= dict(rising=rising)
    expected = dict(reference.double().named_parameters())

    def loss(i: int) -> Tensor:
        (data,) = batches(i)
        logits = reference(data["input_ids"]).flatten(0, 1)
        return cross_entropy(logits, data["targets"].flatten(), ignore_index=-100)

    adamw_by_hand(expected, loss, layer_of, masks.active, rate, **options)
    anew = not replacement and policy == "drop" and not rising  # most first steps at a full rate: 1.1e-4 with AVX-512
    assert distance(step.params, expected) < (3e-4 if anew else 1e-4)


# Compilation.


@pytest.mark.compiles
@pytest.mark.parametrize("recompute", few([False, True], True))
def test_a_change_of_mask_never_recompiles(recompute, traced):
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=3, period=1)  # a mask of three layers, one of one
    optimizer = omgd(everything(params, adamw()), params, masks, turn_warmup=3)
    step = make(model, optimizer, mode="segments", recompute=recompute)
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
@pytest.mark.parametrize(
    ("recompute", "tied"),
    [(False, False), *(pytest.param(*case, marks=slow) for case in ((True, False), (True, True)))],
)
def test_sets_of_tensors_share_the_graphs_of_their_segments(recompute, tied, traced):
    """A forward for all gradients of a segment and one for none, which without gradients at all (below what trains, or
    with recompute) is another. An update for each shape. A tied matrix is in two segments, so a head may lack it."""
    model = llama(3, tied)
    params = dict(model.named_parameters())
    masks = traversal(tensors(params), KEY, keep=0.3, period=1)
    optimizer = omgd(everything(params, sgd()), params, masks, turn_warmup=2)
    step = make(model, optimizer, mode="segments", recompute=recompute)
    torch._dynamo.reset()
    counters.clear()
    sets = set()
    for i in range(24):
        run(step, i, i + 1)
        sets |= {tuple(trains(step.state, n) for n in params if f".layers.{layer}." in n) for layer in range(3)}
    assert len(sets) > 40
    forwards = {"embed": 2 + recompute, "block": 3 + recompute, "head": 2 + tied}
    assert graphs() <= sum(forwards.values()) + len({p.shape for p in params.values()})


@pytest.mark.compiles
@slow
@pytest.mark.parametrize("kind", ["layers", "tensors", "coordinates"])
def test_compiled_equals_uncompiled(kind):
    ends = []
    for mode in ("off", "segments"):
        model = llama(3)
        params = dict(model.named_parameters())
        step = make(model, omgd(everything(params, adamw(eps=EPS)), params, KINDS[kind](params)), mode=mode)
        ends.append(run(step, 0, 9).params)
    assert distance(ends[0], ends[1]) < 1e-4
