"""The learning rate that rises again at each turn: in numbers, in stacks of wrappers, taken over, shown, refused."""

import pytest
import torch
from helpers.masks import DECAY, EPS, KEY, LR, everything, make, named, run
from helpers.models import llama
from torch import Tensor

from engine.checkpoint.rules import described
from engine.inspection.measures import adamw_update, look
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from optimizers.contract import Kind, UsageError
from optimizers.convert import convert
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal
from optimizers.wrappers.warmup import warming

HYPER = {"lr": torch.tensor(0.5), "weight_decay": torch.tensor(0.1)}


def test_update_and_decay_rise_along_a_line_to_those_of_the_rule():
    rule, p, g = sgd(0.0), torch.full((3,), 2.0, dtype=torch.float64), torch.tensor([1.0, -2.0, 4.0])
    slow, shares = warming(rule, 4), []
    slots = slow.init(p)
    for _ in range(6):
        delta, slots = slow.update(g, slots, p, HYPER)
        shares.append(delta / rule.update(g, rule.init(p), p, HYPER)[0])
    expected = torch.tensor([0.25, 0.5, 0.75, 1, 1, 1])
    torch.testing.assert_close(torch.stack(shares).float(), expected[:, None].expand(6, 3))
    assert slots["age"] == 6 and slots["age"].dtype == torch.float32 and slow.names(Kind.COUNTER)[-1] == "age"


@pytest.mark.parametrize("policy", ["drop", "keep", "offload"])
def test_what_stays_goes_on_and_what_returns_begins_anew(policy):
    model = llama(4)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=2, period=3, replacement=True)
    step = make(model, omgd(everything(params, adamw(eps=EPS)), params, masks, "none", policy, turn_warmup=2))
    turn = dict.fromkeys(range(4), 0)
    for i in range(14):
        run(step, i, i + 1)
        turn = {j: turn[j] + 1 if j in masks.active(i) else 0 for j in range(4)}
        for j in masks.active(i):
            assert step.state[f"model.layers.{j}.mlp.up_proj.weight"]["age"] == turn[j], (i, j)
    assert max(turn.values()) > 3, "one stayed at a switch"
    assert "age" not in step.state["lm_head.weight"]


def test_wrappers_of_wrappers_count_their_own_turns():
    params = named(4, 8)
    inner = traversal(layers(params, r"\blayers\.(\d)\."), KEY, active=2, period=4)
    base = omgd(everything(params, adamw()), params, inner, "none", "keep", 2)
    outer = traversal(layers(params, r"\blayers\.(\d)\."), KEY, active=2, period=3, replacement=True)
    both = omgd(base, params, outer, "none", "keep", 3)
    slots = {slot.name for slot in both.owner["layers.0.w"].rule.slots}
    assert {"age", "age2"} <= slots and both.metadata["turn_warmup"] == "3"
    assert both.metadata["over.turn_warmup"] == "2"
    plain = omgd(base, params, outer, "none", "keep")
    assert "turn_warmup" not in plain.metadata and plain.metadata["over.turn_warmup"] == "2"
    assert "turn_warmup" not in omgd(everything(params, adamw()), params, inner).metadata, "as it was saved before"


@pytest.mark.parametrize("form", ["merged", "products"])
def test_a_new_subspace_under_masks_is_a_turn_of_its_own(form):
    model = llama(2)
    params = dict(model.named_parameters())
    names = [name for name in params if "_proj" in name]
    masks = traversal(layers(params), KEY, active=1, period=5)
    base = omgd(everything(params, adamw(eps=EPS)), params, masks, "none", "drop", 4)
    optimizer = rso(base, params, names, 4, 3, KEY, form, warmup=2)
    attach(model, names, 4, form)
    step = Step(cut(model), params, optimizer, optimizer.init(params), mode="off", key=KEY)
    seen: list[tuple[int, int]] = []
    for i in range(9):
        run(step, i, i + 1)
        (active,) = masks.active(i)
        slots = step.state[f"model.layers.{active}.mlp.up_proj.weight"]
        seen.append((int(slots["age2"]), int(slots["age"])))
    subspace, mask = zip(*seen, strict=True)
    assert subspace == (1, 2, 3, 1, 2, 1, 1, 2, 3), "of P, anew at each of them and in each mask"
    assert mask == (1, 2, 3, 1, 2, 1, 1, 2, 3), "a new P forgets the inner rule's state, so its rate rises again"


def swapped(rising: int, after: int) -> Tensor:
    """The ages in a state after a swap from masks under which rates rise over 5 steps to such over `rising`."""
    model = llama(2)
    params = dict(model.named_parameters())
    masks = traversal(layers(params), KEY, active=1, period=8)
    source = omgd(everything(params, adamw(eps=EPS)), params, masks, "none", "drop", 5)
    step = run(make(model, source), 0, after)
    target = omgd(everything(params, adamw(eps=EPS)), params, masks, "none", "drop", rising)
    with torch.no_grad():
        state, _ = convert(step.params, step.state, source, target, after, KEY)
    return torch.stack([slots["age"] for slots in state.values() if "age" in slots])


def test_a_state_that_is_taken_over_is_as_old_as_what_it_has_seen():
    assert (swapped(5, 3) == 3).all(), "as it was"
    assert (swapped(7, 3) == 3).all(), "from the moments"
    model = llama(2)
    params = {name: p for name, p in model.named_parameters() if "_proj" in name}
    plain, target = everything(params, snsm(4, 3)), traversal(layers(params), KEY, active=1, period=8)
    rising = omgd(everything(params, adamw()), params, target, "none", "drop", 5)
    state, _ = convert(params, plain.init(params), plain, rising, 1, KEY)
    assert all(slots["age"] == 0 for slots in state.values()), "of what has seen nothing the rate rises"


def test_inspect_says_how_far_a_turn_is_and_what_update_that_makes():
    p, g = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.ones(8, 6)
    params = {"layers.0.w": p, "layers.1.w": p.clone()}
    optimizer = omgd(
        everything(params, adamw()), params, traversal(layers(params), KEY, active=1, period=9), turn_warmup=4
    )
    ((name, slots),) = optimizer.init(params).items()
    group = optimizer.owner[name]
    hyper = {"lr": torch.tensor(LR), "weight_decay": torch.tensor(DECAY)}
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        delta, slots = group.rule.update(g, slots, p, hyper)
        assert look(name, p, slots, described(group)).measures["turn_rate"] == share
        found = adamw_update(slots, p, described(group))
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-8)


def test_what_cannot_be_is_refused():
    params = named(4)
    base, chosen = everything(params, adamw()), layers(params)
    joint = traversal(chosen, KEY, active=1, period=2, order="joint")
    with pytest.raises(UsageError, match="turn_warmup: got 3 under order 'joint'"):
        omgd(base, params, joint, "grad", "keep", 3)
    with pytest.raises(UsageError, match="turn_warmup: got -1"):
        omgd(base, params, traversal(chosen, KEY, active=1, period=2), turn_warmup=-1)
