"""What is not honoured is refused by a message that says what to do: nothing is accepted and read by nothing."""

import copy

import pytest
import torch
from helpers.plugged import LR, facade, facade_step, options, same_state, toy
from torch import nn

from optimizers import torch_optim
from optimizers.contract import UsageError
from optimizers.registry import RULES


def refused(match: str):
    return pytest.raises(UsageError, match=match)


@pytest.mark.parametrize("flag", ["foreach", "fused", "capturable", "differentiable"])
def test_flags_that_are_not_honoured(flag):
    model = toy()
    opt = facade(model, "sumo")
    assert flag in opt.defaults and all(flag in group for group in opt.param_groups)
    with refused(f"{flag}: got True"):
        facade(toy(), "sumo", **{flag: True})
    opt.param_groups[0][flag] = True
    with refused(f"{flag}: got True"):
        facade_step(opt, model, 0)


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name](**options(name)).elementwise])
def test_parameters_without_names(name):
    for groups in (list(toy().parameters()), [{"params": list(toy().parameters()), "weight_decay": 0.1}]):
        with refused("without names.*named_parameters"):
            torch_optim.optimizer(name)(groups, lr=LR)


def test_rules_of_single_entries_need_no_names():
    model = toy()
    opt = torch_optim.AdamW(model.parameters(), lr=LR)
    facade_step(opt, model, 0)
    with refused("given? .*name"):
        torch_optim.AdamW([model.lm_head.weight, ("a", model.embed_tokens.weight)])


def test_a_rank_above_a_side_names_the_parameter():
    with refused(r"layers.0.q_proj.weight \(6, 6\): rank must lie in \[1, 6\]"):
        torch_optim.SUMO(toy(), lr=LR, rank=7)
    with refused(r"rank must lie in"):
        torch_optim.GaLore([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 5}])


@pytest.mark.parametrize("how", ["in a group with a rank", "a shard by its name", "a flat parameter", "a large one"])
def test_flattened_matrices(how):
    flat = nn.Parameter(torch.zeros(36))
    given = {
        "in a group with a rank": [{"params": [flat], "rank": 2}],
        "a shard by its name": [("layers.0.self_attn.q_proj.weight", flat)],
        "a flat parameter": [("_fsdp_wrapped_module.flat_param", flat)],
        "a large one": [("0.weight", nn.Parameter(torch.zeros(2**16)))],
    }[how]
    with refused("matrix"):
        torch_optim.SUMO(given, **({} if "rank" in how else {"rank": 2}))


def test_parameters_that_a_host_flattens_afterwards():
    model = toy()
    opt = facade(model, "sumo")
    flat = nn.Parameter(torch.zeros(100))
    flat.grad = torch.ones(100)
    whole = [dict(group) for group in opt.param_groups]
    opt.param_groups[0]["params"] = [flat]
    with refused("flattened"):
        opt.step()
    opt.param_groups[0] |= whole[0]
    model.lm_head.weight.data = torch.zeros(42)
    with refused(r"lm_head.weight: got a tensor of shape \(42,\), expected \(7, 6\)"):
        opt.step()


def test_state_of_parameters_that_are_in_no_group():
    model = toy()
    opt = facade(model, "sumo")
    group = opt.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]  # as FSDP2's prepare does
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    with refused("in no group.*after the model is wrapped"):
        opt.step()


def test_state_that_a_host_cleared():
    model = toy()
    opt = facade(model, "sumo")
    opt.state.clear()
    with refused("has no state"):
        facade_step(opt, model, 0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ranc": 3}, "ranc"),
        ({"momentum": 2.0}, "momentum must lie"),
        ({"perpendicular": "orthogonal", "rho": 0.0}, "perpendicular='orthogonal', which changes nothing"),
        ({"rest": "nothing"}, "nothing"),
        ({"rest": "muon"}, "muon needs a matrix"),
        ({"rest_options": {"rank": 3}}, "rank"),
        ({"match": ("nowhere",)}, "matches no parameter"),
        ({"match": ("(",)}, "no regular expression"),
        ({"match": ("bias",)}, "needs a matrix"),
    ],
)
def test_options_of_the_optimizer(given, match):
    with refused(match):
        torch_optim.SUMO(toy(), **{**options("sumo"), **given})


@pytest.mark.parametrize("key", ["ranc", "betas", "count", "why", "added", "dampening"])
def test_a_key_of_a_group_that_nothing_reads(key):
    with refused(key):
        torch_optim.SUMO([{"params": toy().named_parameters(), key: 1}], **options("sumo"))


def test_a_projection_that_is_not_ours():
    with refused("proj_type: got 'reverse_std', expected 'std'"):
        torch_optim.GaLore(
            [{"params": [("a", nn.Parameter(torch.zeros(4, 4)))], "rank": 2, "proj_type": "reverse_std"}]
        )


@pytest.mark.parametrize("key", ["rank", "betas", "update_proj_gap"])
def test_options_in_a_group_after_it_was_made(key):
    model = toy()
    opt = facade(model, "sumo")
    opt.param_groups[0][key] = 3
    with refused(f"got the option '{key}' after"):
        facade_step(opt, model, 0)
    del opt.param_groups[0][key]
    opt.param_groups[0]["options"] = {**opt.param_groups[0]["options"], "rho": 0.0}
    with refused("were changed"):
        facade_step(opt, model, 0)


@pytest.mark.parametrize(
    "what", ["torch's", "another rule", "another weight", "another rank", "groups", "dtype", "a slot less", "unknown"]
)
def test_a_state_dict_of_something_else_changes_nothing(what):
    model = toy()
    opt = facade(model, "sumo")
    saved = copy.deepcopy(opt.state_dict())
    if what == "torch's":
        groups = [{"params": group["params"]} for group in opt.param_groups]
        saved = torch.optim.AdamW(groups).state_dict()
    elif what == "another rule":
        saved = facade(toy(), "galore").state_dict()
    elif what == "another rank":
        saved = torch_optim.SUMO(toy(), rank=3, update_proj_gap=3).state_dict()
    elif what == "another weight":  # of the same shapes
        saved = facade(toy(), "sumo", rho=0.5).state_dict()
    elif what == "groups":
        saved["param_groups"].pop()
    elif what == "dtype":
        saved["state"][0]["basis"] = saved["state"][0]["basis"].bfloat16()
    elif what == "a slot less":
        del saved["state"][0]["basis"]
    else:
        saved["state"][99] = {}
    before, count = copy.deepcopy(opt.named_state()), [g["count"] for g in opt.param_groups]
    with refused("state"):
        opt.load_state_dict(saved)
    assert same_state(before, opt.named_state()) and [g["count"] for g in opt.param_groups] == count


def test_sparse_gradients():
    table = nn.Embedding(5, 4, sparse=True)
    opt = torch_optim.AdamW(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    with refused("sparse"):
        opt.step()


def test_two_parameters_of_one_name():
    with refused("two parameters are called 'a'"):
        torch_optim.AdamW([("a", nn.Parameter(torch.zeros(2))), ("a", nn.Parameter(torch.zeros(2)))])


def test_nothing_to_train():
    with refused("nothing to train"):
        torch_optim.SUMO([])
    with refused("frozen"):
        torch_optim.SUMO(toy().requires_grad_(False), **options("sumo"))
    with refused("lr must be at least 0"):
        model = toy()
        facade_step(torch_optim.SUMO(model, **options("sumo")), model, 10**6)
