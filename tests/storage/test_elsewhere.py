"""What else knows that slots are kept in fewer bytes: conversion, inspection, files, the facade."""

import math

import pytest
import torch
from helpers.matrices import randn, same
from helpers.plugged import STEPS, engine, engine_step, facade, facade_step, same_state, toy, weights
from helpers.plugged import same as same_weights

from engine.checkpoint import CheckpointError
from engine.checkpoint.plugged import load_state, save_state
from engine.checkpoint.rules import described
from engine.inspection.measures import look
from optimizers import torch_optim
from optimizers.apply import move
from optimizers.contract import Group, Optimizer, Rule, UsageError
from optimizers.convert import convert
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.registry import RULES
from optimizers.storage.slots import SCALE, decoded
from optimizers.storage.stored import stored
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal
from tests.support import small

HYPER = {"lr": torch.tensor(0.01), "weight_decay": torch.tensor(0.0)}


def owning(rule: Rule, params: dict[str, torch.Tensor]) -> Optimizer:
    return partition(params, [Group("all", rule, ("",), 0.01)])


def trained(rule: Rule, p: torch.Tensor, steps: int = 3) -> dict[str, torch.Tensor]:
    slots = rule.init(p)
    for t in range(steps):
        g = randn(*p.shape, seed=20 + t)
        if rule.refresh and t == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        _, slots, _ = move(rule, g, slots, p, HYPER, seed=torch.tensor(t, dtype=torch.int32))
    return slots


# conversion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon", "sumo", "galore", "snsm"])
@pytest.mark.parametrize("back", [False, True])
def test_another_form_is_taken_over_as_it_is(name, back):
    params = {"w": randn(24, 40)}
    plain, short = small(RULES[name]), stored(small(RULES[name]), "int8", "bf16")
    old, new = (short, plain) if back else (plain, short)
    held = trained(old, params["w"])
    state, (row,) = convert(params, {"w": held}, owning(old, params), owning(new, params), 3, Key(0))
    assert row.did == "kept, in another form" and row.source == row.target == name
    assert abs(row.first_kept - 1) < 0.01 and abs(row.jump - 1) < 0.05
    kept, before = decoded(state["w"]), decoded(held)
    for slot, t in before.items():
        if t.is_floating_point() and t.ndim > 1:
            assert (kept[slot] - t).norm() <= 0.02 * t.norm(), slot
        else:
            assert kept[slot].equal(t), slot
    if back:
        assert same(kept, before), "float32 holds it all"
    pointers = {t.data_ptr() for t in held.values()}
    assert not pointers & {t.data_ptr() for t in state["w"].values()}


def test_the_same_form_is_kept_to_the_bit_and_another_rule_adopts():
    params, short = {"w": randn(24, 40)}, stored(small(RULES["galore"]), "int8", "bf16")
    held = trained(short, params["w"])
    again = stored(small(RULES["galore"]), "int8", "bf16")
    state, (row,) = convert(params, {"w": held}, owning(short, params), owning(again, params), 3, Key(0))
    assert row.did == "kept" and same(state["w"], held)
    adamw = stored(RULES["adamw"](), "int8")
    state, (row,) = convert(params, {"w": held}, owning(short, params), owning(adamw, params), 3, Key(0))
    assert row.did == "kept" and row.target == "adamw" and state["w"]["exp_avg"].dtype == torch.int8
    assert 0.5 < row.first_kept < 1.1 and math.isfinite(row.jump)


def test_masks_over_it_and_subspaces_of_it_carry_its_slots():
    params = {f"layers.{i}.x_proj.weight": randn(16, 12, seed=i) for i in range(2)}
    base = owning(stored(RULES["adamw"](), "int8"), params)
    under = rso(base, params, params, 4, 3, Key(0), moments="transform")
    state = under.init(params)
    for name, slots in state.items():
        rule = under.owner[name].rule
        _, state[name], _ = move(rule, randn(16, 4), slots, params[name], HYPER, seed=torch.tensor(1))
    _, after = under.switch(params, state, 3, Key(0))
    for name, slots in after.items():
        turn = state[name]["P"].T @ slots["P"] * (4 / 12)
        wanted = decoded(state[name])["exp_avg"] @ turn
        assert (decoded(slots)["exp_avg"] - wanted).norm() <= 0.02 * wanted.norm()
        assert slots["exp_avg"].dtype == torch.int8 and slots["exp_avg_sq"].equal(state[name]["exp_avg_sq"])
    masks = traversal(layers(params), Key(1), active=1, period=2)
    over = omgd(base, params, masks, state_policy="keep")
    state = over.init(params)
    _, after = over.switch(params, state, 2, Key(0))
    assert all("exp_avg" + SCALE in slots for slots in after.values())


# inspection ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sumo"])
def test_inspection_says_what_is_kept_and_measures_what_it_stands_for(name):
    p, plain, short = randn(24, 40), small(RULES[name]), stored(small(RULES[name]), "int8", "bf16")
    slots = trained(short, p)
    seen = look("w", p, slots, described(Group("all", short, ("",), 0.01)))
    assert {slot.name: slot.dtype for slot in seen.slots} == {
        slot: str(t.dtype).removeprefix("torch.") for slot, t in slots.items()
    }
    assert sum(slot.bytes for slot in seen.slots) == sum(t.nbytes for t in slots.values())
    alike = look("w", p, decoded(slots), described(Group("all", plain, ("",), 0.01)))
    assert seen.measures == pytest.approx(alike.measures, nan_ok=True) and "first_rms" in seen.measures
    first = next(slot for slot in slots if slot + SCALE in slots)
    bad = {**slots, first + SCALE: torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=f"{first} is .*int8 with scales .* do not go together"):
        look("w", p, bad, described(Group("all", short, ("",), 0.01)))


# the facade ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sumo"])
def test_the_facade_is_the_engine_to_the_bit_through_files(name, tmp_path):
    bases = {"bases_dtype": "bf16"} if name == "sumo" else {}
    theirs, mine = toy(), toy()
    step, opt = engine(theirs, name, kept=("int8", *bases.values())), facade(mine, name, moments_dtype="int8", **bases)
    for i in range(STEPS):
        if i == 5:
            save_state(opt, tmp_path / "optimizer.safetensors")
            opt = facade(mine, name, moments_dtype="int8", **bases)
            load_state(opt, tmp_path / "optimizer.safetensors")
        engine_step(step, theirs, i)
        facade_step(opt, mine, i)
        assert same_weights(weights(mine), weights(theirs)), i
        assert same_state(opt.named_state(), step.state), i
    assert {t.dtype for slots in opt.named_state().values() for t in slots.values()} >= {torch.int8}


def test_a_state_that_is_kept_in_another_form_is_refused(tmp_path):
    model = toy()
    short, plain = facade(model, "adamw", moments_dtype="int8"), facade(model, "adamw")
    with pytest.raises(UsageError, match=r"saved with adamw .* kept in \['int8', 'fp32'\], expected"):
        plain.load_state_dict(short.state_dict())
    save_state(short, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="was trained by adamw .*moments_dtype"):
        load_state(plain, tmp_path / "state.safetensors")
    with pytest.raises(UsageError, match="bases_dtype: got 'bf16', which changes nothing: adamw"):
        facade(model, "adamw", bases_dtype="bf16")
    groups = [{"params": model.named_parameters(), "moments_dtype": "bf16"}]
    assert torch_optim.AdamW(groups).param_groups[0]["moments_dtype"] == "bf16"
