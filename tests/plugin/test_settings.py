"""Nothing is accepted and read by nothing: each argument and each key of a group changes something or is refused."""

import dataclasses
import inspect
import typing

import pytest
import torch
from helpers.grids import few
from helpers.plugged import DECAY, GAP, LR, RANK, gradients, toy
from torch import nn

from optimizers import InBackward, Masks, motion, torch_optim
from optimizers.contract import UsageError, idle
from optimizers.groups import OWN, TEXTS
from optimizers.registry import RULES
from optimizers.rule_optimizer import REFUSED, RuleOptimizer

STEPS = 7
SUMO = {"rank": RANK, "update_proj_gap": GAP}


def trained(opt, model):
    """What some steps make of a model."""
    for i in range(STEPS):
        opt.zero_grad()
        model(gradients(model, i)).backward()
        opt.step()
    return seen_of(opt, model)


def seen_of(opt, model):
    """What training is seen by: weights and state, as one vector."""
    slots = [t for slots in opt.named_state().values() for t in slots.values()]
    return torch.cat([t.detach().double().flatten() for t in (*model.parameters(), *slots)])


def differ(a, b) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)


MOVING = {  # arguments of which another value is another training, with what else has to be given for it
    "lr": (0.1, {}),
    "weight_decay": (0.5, {}),
    "rest": ("sgd", {}),
    "rest_lr": (0.5, {}),
    "rest_options": ({"eps": 0.1}, {}),
    "match": ((r"q_proj\.weight",), {}),
    "wrap": (Masks(active=1, period=2), {}),
    "in_backward": (InBackward(clip_norm=0.1), {"rest": "sgd"}),
    "seed": (1, {}),
    "stagger": (False, {}),
    "stochastic_rounding": (True, {"dtype": torch.bfloat16}),
    "moments_dtype": ("int8", {}),
    "bases_dtype": ("bf16", {}),
    "maximize": (True, {}),
}


def sumo(dtype=torch.float32, **given):
    model = toy().to(dtype)
    return trained(torch_optim.SUMO(model, **{"lr": LR, "weight_decay": DECAY, **SUMO, **given}), model)


def test_each_argument_is_among_these():
    known = set(inspect.signature(RuleOptimizer.__init__).parameters) - {"self", "params", "options"}
    assert known == {*MOVING, *REFUSED, "compile"}
    assert set(OWN) <= known and set(REFUSED) <= set(OWN)


@pytest.mark.parametrize("argument", MOVING)
def test_each_argument_changes_something(argument):
    value, beside = MOVING[argument]
    assert differ(sumo(**beside), sumo(**beside, **{argument: value}))


def test_compile_compiles(monkeypatch):
    compiled = []
    monkeypatch.setattr(motion, "compiled", lambda kernel: (compiled.append(kernel), kernel)[1])
    before = sumo()
    assert not compiled
    assert not differ(before, sumo(compile=True)) and compiled


MASKS = {  # of each setting another value, and what else has to be given for it
    "active": (2, {}),
    "period": (1, {}),
    "pattern": (r"layers\.(\d+)\.q", {}),
    "replacement": (True, {"period": 1}),
    "scale_mode": ("none", {}),
    "turn_warmup": (2, {}),
}


def test_each_setting_of_masks_and_of_in_backward_changes_something():
    assert {field.name for field in dataclasses.fields(Masks)} == set(MASKS)
    for setting, (value, beside) in MASKS.items():
        base = {"active": 1, "period": 2, **beside}
        assert differ(sumo(wrap=Masks(**base)), sumo(wrap=Masks(**{**base, setting: value}))), setting
    base = InBackward()
    assert {field.name for field in dataclasses.fields(base)} == {"micro_batches", "clip_norm"}
    model = toy()
    sgd = {"rest": "sgd", "rest_lr": LR}
    assert differ(sumo(in_backward=base, **sgd), sumo(in_backward=InBackward(clip_norm=0.1), **sgd))
    opt = torch_optim.SUMO(model, in_backward=InBackward(micro_batches=2), **SUMO)
    model(gradients(model, 0)).backward()
    assert opt.zero_grad() is None and not any(group["count"] for group in opt.param_groups)
    model(gradients(model, 0)).backward()
    assert all(p.grad is not None for p in model.parameters()), "one pass of two"


def grouped(key=None, value=None, dtype=torch.float32):
    """The matrices in a group that has this key, all else in one that has not."""
    model = toy().to(dtype)
    named = dict(model.named_parameters())
    own = {"params": [(n, p) for n, p in named.items() if n.endswith("_proj.weight")], "rule": "sumo", **SUMO}
    rest = {"params": [(n, p) for n, p in named.items() if not n.endswith("_proj.weight")]}
    return torch_optim.SUMO([{**own, **({key: value} if key else {})}, rest], LR, DECAY), model


@pytest.mark.parametrize("key", OWN)
def test_each_key_of_a_group_changes_something_or_is_refused(key):
    if key in REFUSED:
        with pytest.raises(UsageError, match=f"{key}: got True"):
            grouped(key, True)
        return
    value, beside = MOVING[key]
    assert differ(trained(*grouped(**beside)), trained(*grouped(key, value, **beside)))
    if key in ("seed", "stochastic_rounding", "maximize"):  # as hosts do it, which set it after the optimizer was made
        opt, model = grouped(**beside)
        opt.param_groups[0][key] = value
        assert differ(trained(*grouped(**beside)), trained(opt, model))


def test_keys_that_are_texts():
    assert set(TEXTS) == {"rule", "name", "options"}
    assert "mine" in grouped("name", "mine")[0].receipt()
    assert differ(trained(*grouped()), trained(*grouped("rule", "galore")))
    assert differ(trained(*grouped()), trained(*grouped("options", {"momentum": 0.1})))


def test_the_first_rate_of_a_schedule_may_be_in_a_group():
    opt, _ = grouped("initial_lr", 0.5)
    with pytest.raises(KeyError, match="initial_lr"):
        torch.optim.lr_scheduler.LambdaLR(grouped()[0], lambda i: 0.5, last_epoch=3)
    for group in opt.param_groups[1:]:
        group["initial_lr"] = 0.5
    torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5, last_epoch=3)
    assert opt.param_groups[0]["lr"] == 0.25


VALUES = {  # other values of the options that are numbers
    "betas": [(0.3, 0.4)],
    "eps": [5.0],
    "momentum": [0.3],
    "steps": [2],
    "rank": [3],
    "update_proj_gap": [2],
    "scale": [0.5],
    "rms": [0.5],
    "rho": [0.5],
    "alpha": [0.1],
    "limiter": [1.01, None],
    "refresh_below": [0.9],
}


def others(name, field):
    """Other values of an option of a rule."""
    default, kind = getattr(RULES[name].default(), field.name), typing.get_type_hints(RULES[name].options)[field.name]
    known = [not default] if kind is bool else VALUES.get(field.name, _texts(kind))
    return [value for value in known if value != default]


def _texts(kind):
    """The values of a Literal, which may be a part of a union."""
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [value for part in typing.get_args(kind) for value in _texts(part)]


def of_rule(name, **given):
    """Two matrices in a group with the options of a rule as keys."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(5, 20, bias=False), "down": nn.Linear(20, 6, bias=False)})
    held = {f.name for f in dataclasses.fields(RULES[name].options)} - idle(RULES[name].default())
    keys = {key: value for key, value in SUMO.items() if key in held} | given
    own = {"params": model.named_parameters(), "rule": name, **keys}
    opt = torch_optim.optimizer(name)([own], LR, DECAY)
    for i in range(STEPS):
        draw = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw) * (1 + i)
        opt.step()
    return seen_of(opt, model)


FAST = [("sumo", "perpendicular"), ("snsm", "subset"), ("galore", "scale"), ("adam_sn", "rank"), ("sgd_sm", "second")]
OPTIONS = [(name, field.name) for name in RULES for field in dataclasses.fields(RULES[name].options)]


@pytest.mark.parametrize("case", few(OPTIONS, *FAST), ids=" ".join)
def test_each_option_of_each_rule_changes_something_or_is_refused(case):
    name, option = case
    (field,) = (f for f in dataclasses.fields(RULES[name].options) if f.name == option)
    before, tried, seen = of_rule(name), others(name, field), []
    assert tried, f"give another value of {option} in VALUES"
    for value in tried:
        try:
            seen.append(differ(before, of_rule(name, **{option: value})))
        except UsageError as error:
            seen.append(option in str(error) or "which changes nothing beside" in str(error))
    assert any(seen), f"{option}: none of {tried} changes anything, or is refused by name"
