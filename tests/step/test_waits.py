"""Nothing in an ordinary step waits for the device: no value is read, no tensor is made on the host."""

from dataclasses import fields

import pytest
import torch
from helpers.grids import covering
from helpers.matrices import randn
from helpers.waits import waits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.step.segments import cut
from engine.step.step import Clip, Step
from models.llama import Llama, LlamaConfig
from optimizers.contract import Group, Rule
from optimizers.partition import partition
from optimizers.random import Key, normal, signs
from optimizers.registry import RULES as FAMILIES
from optimizers.rules.adamw import adamw
from tests.support import MATRICES, PRECISIONS, WRAPPERS, small, wrapped


def rarely(name: str, **options: object) -> Rule:
    """The rule, whose bases are not rebuilt after the first step unless it asks for that itself."""
    gap = (
        {"update_proj_gap": 1000}
        if "update_proj_gap" in {field.name for field in fields(FAMILIES[name].options)}
        else {}
    )
    return small(FAMILIES[name], **gap, **options)


CASES: dict[str, Rule] = {name: rarely(name) for name in FAMILIES}
CASES |= {"sumo below": rarely("sumo", refresh_below=0.5), "muon exact": rarely("muon", orthogonalize="exact")}
CLIPS: tuple[Clip, ...] = ("none", "tensor", "global", "previous")


def made(rule: Rule, wrapper: str, precision: str, **options: object) -> Step:
    model = Llama(LlamaConfig(32, 16, 24, 2, 2, max_position_embeddings=8), seed=0)
    if precision.startswith("bf16"):
        model.to(torch.bfloat16)
    params = dict(model.named_parameters())
    groups = [Group("rule", rule, (MATRICES,), 1e-2), Group("rest", adamw(eps=1e-6), ("",), 1e-3)]
    optimizer = wrapped(wrapper, partition(params, groups), model, params)
    mixed = torch.bfloat16 if precision == "mixed" else None
    rounding = precision == "bf16-sr"
    return Step(
        cut(model),
        params,
        optimizer,
        optimizer.init(params),
        mode="off",
        compute_dtype=mixed,
        stochastic_rounding=rounding,
        key=Key(3),
        **options,
    )


def batch(i: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def ordinary(step: Step, first: int = 1) -> int:
    """The first step from here on before which nothing switches, and in which nothing but a rule's own criterion
    rebuilds a basis."""
    often = {name for name, group in step.optimizer.owner.items() if group.rule.gap == 1}
    quiet = (i for i in range(first, first + 40) if not {*step.optimizer.due(i, step.state)} - often)
    return next(i for i in quiet if not step.optimizer.switches(i))


def asked(step: Step, monkeypatch: pytest.MonkeyPatch, micro_batches: int = 2) -> dict[str, int]:
    """What an ordinary step asks for, once some steps are done."""
    at = ordinary(step)
    for i in range(at):
        step.switch(i)
        step([batch(i)] * micro_batches, step=i)
    given = [batch(at)] * micro_batches
    step.missing.names()  # answers that have arrived, which lie on the host
    with waits(monkeypatch) as found:
        step(given, step=at)
    return dict(found)


@pytest.mark.parametrize(("rule", "precision"), covering(CASES, PRECISIONS))
def test_of_no_rule(rule, precision, monkeypatch):
    assert asked(made(CASES[rule], "none", precision), monkeypatch) == {}


@pytest.mark.parametrize(("clip", "recompute", "slices"), covering(CLIPS, (False, True), (1, 3)))
def test_of_no_mode(clip, recompute, slices, monkeypatch):
    step = made(CASES["adamw"], "none", "mixed", clip=clip, recompute=recompute, logits=16 * 32 // slices)
    assert asked(step, monkeypatch) == {}


@pytest.mark.parametrize(("wrapper", "precision"), covering(WRAPPERS, PRECISIONS))
def test_of_no_wrapper(wrapper, precision, monkeypatch):
    assert asked(made(CASES["snsm"], wrapper, precision), monkeypatch) == {}


def test_what_would_wait_is_seen(monkeypatch):
    x = torch.arange(3.0)
    for ask in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: torch.tensor(3.0, device="cpu") + x,
        lambda: torch.arange(3),
        lambda: x[x > 1],
        lambda: x.nonzero(),
    ):
        with waits(monkeypatch) as found:
            ask()
        assert found
    with waits(monkeypatch) as found:
        torch.where(x > 0, x, 0.0).mul_(2).fill_(3.0)
        torch.zeros(3, device=x.device).add_(x)
    assert not found


def test_sumos_own_criterion_selects_what_it_would_have_skipped(monkeypatch):
    """Where nothing may be read, a basis is drawn and not taken: the same numbers as where the host skips it."""
    rule, p = CASES["sumo below"], randn(12, 8)
    for scale in (1e-3, 1e3):  # below the bound, and above it
        g = scale * randn(12, 8, seed=1)
        slots = rule.refresh(g, rule.init(p), Key(1))[0]
        read, said = rule.refresh(g, slots, Key(2))
        with waits(monkeypatch) as found:
            selected, ok = rule.refresh(g, slots, Key(2))
        assert not found and ok.equal(said)
        assert all(selected[slot].equal(t) for slot, t in read.items())
        assert read["basis"].equal(slots["basis"]) == (scale == 1e3)


@pytest.mark.parametrize("draw", [lambda at: normal(Key(1), (3, 2), at), lambda at: signs(Key(1), 9, at)])
def test_what_a_device_needs_is_drawn_there(draw, monkeypatch):
    asked: list[str] = []
    real = torch.Generator

    def generator(device: str) -> torch.Generator:
        asked.append(device)
        return real("cpu")

    monkeypatch.setattr(torch, "Generator", generator)
    with FakeTensorMode():
        assert draw("cuda").device.type == "cuda" and asked == ["cuda"]
