"""What loops, schedulers, scalers and checkpoints ask of a torch.optim.Optimizer."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.grids import few
from helpers.plugged import (
    DECAY,
    GAP,
    LR,
    RANK,
    facade,
    facade_step,
    gradients,
    options,
    same,
    same_state,
    toy,
    weights,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optimizers import torch_optim
from optimizers.registry import RULES

each_rule = pytest.mark.parametrize("name", RULES)
COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def filled(model, step=0):
    for name, g in gradients(model, step).items():
        model.get_parameter(name).grad = g


def test_a_model_its_names_and_groups_give_the_same():
    made = []
    for give in (lambda m: m, lambda m: m.named_parameters(), lambda m: [{"params": m.named_parameters()}]):
        model = toy()
        opt = torch_optim.SUMO(give(model), lr=LR, **options("sumo"))
        for i in range(5):
            facade_step(opt, model, i)
        made.append(weights(model))
    assert same(made[0], made[1]) and same(made[0], made[2])


def test_what_is_no_map_is_adamws_and_the_receipt_says_so():
    opt = torch_optim.SUMO(toy(), lr=LR, weight_decay=DECAY, rest_lr=0.5, **options("sumo"))
    owned = {name: (g["rule"], g["lr"], g["weight_decay"]) for g in opt.param_groups for name in g["param_names"]}
    assert owned["layers.0.q_proj.weight"] == ("sumo", LR, DECAY)
    assert owned["embed_tokens.weight"] == owned["lm_head.weight"] == ("adamw", 0.5, DECAY)
    assert owned["layers.0.norm.weight"] == owned["layers.0.up_proj.bias"] == ("adamw", 0.5, 0.0)
    said = opt.receipt()
    assert "sumo rank 2" in said and "adamw-norms" in said and "lm_head.weight" in said and "not decayed" in said


def test_the_model_knows_an_embedding_by_its_kind_whatever_it_is_called():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(9, 6), "map": torch.nn.Linear(6, 6)})
    rules = {n: g["rule"] for g in torch_optim.Muon(model).param_groups for n in g["param_names"]}
    assert rules == {"table.weight": "adamw", "map.weight": "muon", "map.bias": "adamw"}


def test_patterns_say_what_is_the_rules():
    opt = torch_optim.Muon(toy(), match=(r"q_proj\.weight$", "lm_head"))
    rules = {n: g["rule"] for g in opt.param_groups for n in g["param_names"]}
    assert {n for n, r in rules.items() if r == "muon"} == {
        "layers.0.q_proj.weight",
        "layers.1.q_proj.weight",
        "lm_head.weight",
    }


def test_galores_groups_are_taken_as_its_users_write_them():
    model = toy()
    maps = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    keys = {"rank": 3, "update_proj_gap": 5, "scale": 0.5, "proj_type": "std"}
    opt = torch_optim.GaLore([{"params": others}, {"params": maps, **keys}], lr=LR)
    assert [g["rule"] for g in opt.param_groups] == ["adamw", "galore"]
    made = opt.param_groups[1]["options"]
    assert (made["rank"], made["update_proj_gap"], made["scale"]) == (3, 5, 0.5)
    assert opt.state[maps[0]]["basis"].shape == (6, 3)
    before = weights(model)
    facade_step(opt, model, 0)
    assert not same(before, weights(model))


def test_a_group_that_is_given_to_another_rule_leaves_the_others_to_be_routed():
    model = toy()
    first, second = model.layers[0].named_parameters("a"), model.layers[1].named_parameters("b")
    groups = [{"params": first, "rule": "adamw"}, {"params": second}]
    rules = {g["name"]: g["rule"] for g in torch_optim.SUMO(groups, **options("sumo")).param_groups}
    assert rules == {"adamw": "adamw", "sumo": "sumo", "adamw-norms": "adamw"}


def test_rates_and_decays_are_read_from_the_group_at_every_step():
    model = toy()
    opt = torch_optim.AdamW(
        [{"params": [("a", model.lm_head.weight)], "lr": 0.0}, {"params": [("b", model.embed_tokens.weight)]}], lr=LR
    )
    before = weights(model)
    filled(model)
    opt.step()
    after = weights(model)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])
    opt.param_groups[0] |= {"lr": torch.tensor(0.5), "weight_decay": 0.5}
    model.lm_head.weight.grad.zero_()
    held, slots = model.lm_head.weight.detach().clone(), copy.deepcopy(opt.state[model.lm_head.weight])
    opt.step()
    moved = held - 0.5 * 0.5 * held
    for slot in ("exp_avg",):
        assert not torch.equal(slots[slot], opt.state[model.lm_head.weight][slot])
    assert (model.lm_head.weight - moved).norm() < (held - moved).norm() * 10
    assert not torch.equal(model.lm_head.weight, held)


@pytest.mark.parametrize("schedule", ["lambda", "cosine", "onecycle"])
def test_schedulers_drive_it(schedule):
    model = toy()
    opt = facade(model, "sumo")
    made = {
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 / (i + 1)),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=5, cycle_momentum=False),
    }[schedule]()
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):
            filled(model, i)
            opt.step()
            made.step()
            rates.append(opt.param_groups[0]["lr"])
    assert len(set(rates)) > 2
    model_two = toy()
    again = facade(model_two, "sumo")
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in opt.param_groups]


def test_a_schedule_of_momenta_is_refused_by_torch():
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(facade(toy(), "sumo"), LR, total_steps=5)


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back():
    model = toy()
    opt = facade(model, "sumo")

    def closure():
        opt.zero_grad()
        loss = model(gradients(model, 0))
        loss.backward()
        return loss

    before = weights(model)
    assert opt.step(closure).requires_grad and not same(before, weights(model))


def test_parameters_come_later_and_count_from_there():
    model = toy()
    first = [(n, p) for n, p in model.named_parameters() if n.startswith("layers.0")]
    later = [(n, p) for n, p in model.named_parameters() if not n.startswith("layers.0")]
    opt = torch_optim.SUMO(first, lr=LR, **options("sumo"))
    for i in range(4):
        filled(model, i)
        opt.step()
    opt.add_param_group({"params": later, "lr": LR / 2})
    assert {g["count"] for g in opt.param_groups} == {0, 4} and opt.param_groups[-1]["lr"] == LR / 2
    filled(model, 4)
    before = weights(model)
    opt.step()
    assert not torch.equal(before["layers.1.up_proj.weight"], weights(model)["layers.1.up_proj.weight"])
    assert opt.state[model.layers[1].up_proj.weight]["basis"].any(), "its first step built its basis"
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": later})
    with pytest.raises(ValueError, match="rank must lie"):
        opt.add_param_group({"params": [("big", torch.nn.Parameter(torch.zeros(9, 9)))], "rank": 10})
    assert len(opt.param_groups) == groups and len({group["name"] for group in opt.param_groups}) == groups
    opt.step()


def test_what_was_frozen_trains_once_it_is_added_and_not_before():
    model = toy()
    model.lm_head.weight.requires_grad_(False)
    opt = facade(model, "sumo")
    assert "frozen" in opt.receipt() and "lm_head.weight" not in opt.named_state()
    filled(model)
    model.lm_head.weight.grad = None
    opt.step()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight.*add_param_group"):
        opt.step()
    opt.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)]})
    filled(model, 1)
    opt.step()


def test_parameters_without_names_have_numbers_that_do_not_meet():
    params = [torch.nn.Parameter(torch.zeros(2), requires_grad=i != 1) for i in range(7)]
    opt = torch_optim.AdamW([{"params": params[:3]}, {"params": params[3]}], lr=LR)
    opt.add_param_group({"params": iter(params[4:])})
    assert list(opt.named_state()) == ["param.0", "param.2", "param.3", "param.4", "param.5", "param.6"]


def test_zero_grad_takes_set_to_none():
    model = toy()
    opt = facade(model, "sumo")
    filled(model)
    opt.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())


COPIED = [("adamw", "deepcopy"), ("galore", "pickle"), ("snsm", "deepcopy"), ("sumo", "pickle")]


@pytest.mark.parametrize("case", few([(name, how) for name in RULES for how in COPIERS], *COPIED), ids=" ".join)
def test_a_copy_goes_on_like_the_original(case):
    name, how = case
    copier = COPIERS[how]
    model = toy()
    opt = facade(model, name)
    for i in range(GAP + 1):
        facade_step(opt, model, i)
    twin, other = copier((model, opt))
    for i in range(GAP + 1, 2 * GAP + 2):
        facade_step(opt, model, i)
        facade_step(other, twin, i)
    assert same(weights(model), weights(twin)) and type(other) is type(opt)


def test_a_step_that_a_scaler_skips_does_not_advance_the_clock():
    model = toy()
    opt, scaler = facade(model, "sumo"), torch.amp.GradScaler("cpu", init_scale=4.0)
    before, state = weights(model), copy.deepcopy(opt.named_state())
    for i, bad in enumerate((True, False)):
        opt.zero_grad()
        scaler.scale(model(gradients(model, i))).backward()
        if bad:
            model.lm_head.weight.grad.fill_(float("inf"))
        scaler.step(opt)
        scaler.update()
        if bad:
            assert same(before, weights(model)) and same_state(state, opt.named_state())
            assert {g["count"] for g in opt.param_groups} == {0}
    assert {g["count"] for g in opt.param_groups} == {1} and not same(before, weights(model))


def test_maximize_is_a_descent_of_the_other_sign():
    up, down = toy(), toy()
    one, other = facade(up, "sumo", maximize=True), facade(down, "sumo")
    filled(up)
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        q.grad = -p.grad
    one.step()
    other.step()
    assert same(weights(up), weights(down))


@each_rule
def test_state_is_there_before_the_first_step_and_a_step_of_zeros_at_rate_zero_is_none(name):
    model = toy()
    opt = facade(model, name)
    assert set(opt.state) == set(model.parameters())
    before, state = weights(model), copy.deepcopy(opt.named_state())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    assert same(before, weights(model)) and same_state(state, opt.named_state())
    assert {g["count"] for g in opt.param_groups} == {0}
    filled(model)
    opt.step()  # a warm-up that starts at rate 0 learns its moments all the same
    assert {g["count"] for g in opt.param_groups} == {1}
    if RULES[name](**options(name)).slots:
        assert not same_state(state, opt.named_state())


def test_a_zero_gradient_draws_no_basis():
    model = toy()
    opt = facade(model, "sumo")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert not any(slots["basis"].any() for slots in opt.named_state().values() if "basis" in slots)


@pytest.mark.parametrize("name", few(RULES, "adamw", "snsm", "sumo"))
def test_dtypes_of_the_state_of_a_bfloat16_model_survive_a_load(name):
    model = toy().bfloat16()
    opt = facade(model, name)
    for i in range(GAP + 1):
        facade_step(opt, model, i)
    before = copy.deepcopy(opt.named_state())
    opt.load_state_dict(opt.state_dict())
    assert same_state(before, opt.named_state())
    other = facade(toy().bfloat16(), name)
    other.load_state_dict(state_dict=copy.deepcopy(opt.state_dict()))  # by keyword, as checkpoints call it
    assert same_state(before, other.named_state())
    facade_step(opt, model, GAP + 1)
    assert same_state(before, other.named_state()), "no memory is shared"


@pytest.mark.parametrize("name", few(RULES, "adamw", "snsm", "sumo"))
def test_torchs_distributed_checkpoint_carries_it(name, tmp_path):
    model = toy().bfloat16()
    opt = facade(model, name)
    for i in range(GAP + 1):
        facade_step(opt, model, i)
    saved = {"optim": get_optimizer_state_dict(model, opt)}
    torch.distributed.checkpoint.save(saved, checkpoint_id=tmp_path / "dcp")
    twin = toy().bfloat16()
    twin.load_state_dict(model.state_dict())
    other = facade(twin, name)
    loaded = {"optim": get_optimizer_state_dict(twin, other)}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=tmp_path / "dcp")
    set_optimizer_state_dict(twin, other, loaded["optim"])
    assert same_state(opt.named_state(), other.named_state())
    assert [g["count"] for g in other.param_groups] == [GAP + 1] * len(other.param_groups)
    for i in range(GAP + 1, 2 * GAP + 2):
        facade_step(opt, model, i)
        facade_step(other, twin, i)
    assert same(weights(model), weights(twin))


def test_state_is_found_by_name_whatever_the_order():
    model, twin = toy(), toy()
    opt = facade(model, "sumo")
    for i in range(3):
        facade_step(opt, model, i)
    other = torch_optim.SUMO(reversed(list(twin.named_parameters())), lr=LR, **options("sumo"))
    saved = copy.deepcopy(opt.state_dict())
    other.load_state_dict(saved)
    assert same_state(dict(sorted(opt.named_state().items())), dict(sorted(other.named_state().items())))


def test_no_name_that_hosts_would_call_without_being_asked():
    assert not {"train", "eval"} & set(dir(facade(toy(), "sumo")))


def test_a_model_that_was_wrapped_or_moved_afterwards_is_the_same():
    model, plain = toy(), toy()
    opt = torch_optim.SUMO(torch.nn.ModuleDict({"module": model}).named_parameters(), lr=LR, **options("sumo"))
    other = torch_optim.SUMO(plain, lr=LR, **options("sumo"))
    for i in range(4):
        facade_step(opt, model, i)
        facade_step(other, plain, i)
    assert same(weights(model), weights(plain)) and opt.named_state().keys() == other.named_state().keys()
    assert opt.param_groups[0]["options"]["rank"] == RANK
