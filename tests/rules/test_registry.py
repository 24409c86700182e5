"""Every rule by its name: what it declares is what it holds, and its options say all that it was made with."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from optimizers import registry
from optimizers.contract import Kind, Rule, UsageError
from optimizers.registry import RULES, rule
from optimizers.wrappers.masked import gathered, scaled
from optimizers.wrappers.subspace import subspace
from tests import rule_table


def small(name: str) -> Rule:
    """The rule with a rank that fits a small matrix."""
    fields = {field.name for field in dataclasses.fields(RULES[name].options)}
    return rule(name, **({"rank": 3} if "rank" in fields else {}))


WRAPPED = {
    **{name: small(name) for name in RULES},
    **{f"scaled {name}": scaled(small(name), "update") for name in RULES},
    **{f"rso {name}": subspace(small(name), 5, form) for name in RULES for form in ("merged", "products")},
    **{f"rso scaled {name}": subspace(scaled(small(name), "grad"), 5, prox=0.1, warmup=3) for name in RULES},
    **{f"scaled rso {name}": scaled(subspace(small(name), 5), "grad") for name in RULES},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_a_rule_declares_is_what_it_holds(name):
    made = WRAPPED[name]
    slots = made.init(torch.zeros(8, 12))
    assert {slot.name for slot in made.slots} == slots.keys()
    assert len({slot.name for slot in made.slots}) == len(made.slots)
    for slot in made.slots:
        assert isinstance(slot.kind, Kind)
        t = slots[slot.name]
        if slot.kind in (Kind.FIRST, Kind.SECOND, Kind.WEIGHT):
            assert t.dtype == torch.float32 and t.ndim == 2, slot
        if slot.kind == Kind.INDEX:
            assert not t.is_floating_point()
    json.dumps(made.settings())
    assert hash(made) == hash(made) and made.options == WRAPPED[name].options


def test_masked_entries_are_declared_too():
    made = gathered(rule("adamw"), 4)
    assert {slot.name for slot in made.slots} == made.init(torch.zeros(8, 12)).keys()
    assert made.names(Kind.INDEX) == ("entries",) and made.settings()["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", RULES)
def test_options_are_all_that_makes_a_rule(name):
    """The same options, read back from the JSON that a checkpoint keeps, make the same rule: bitwise the same steps."""
    one = small(name)
    read = json.loads(json.dumps(one.settings()))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}
    two = RULES[name].of(RULES[name].options(**given))
    assert two.options == one.options and two.name == one.name == name
    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    hyper = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.1)}
    moved: list[Tensor] = []
    for made in (one, two):
        slots = made.init(g)
        if made.refresh is not None:
            slots, _ = made.refresh(g, slots, 1)
        moved.append(made.update(g, slots, g, hyper)[0])
    assert torch.equal(*moved)


def test_an_unknown_rule_or_option_is_named():
    with pytest.raises(UsageError, match="'adam' is not known; give one of adamw, sgd"):
        rule("adam")
    with pytest.raises(UsageError, match="sgd: .*'beta'.* its options are momentum, nesterov"):
        rule("sgd", beta=0.9)


def test_the_table_in_the_docs_is_the_registrys():
    text = rule_table.PAGE.read_text(encoding="utf-8")
    assert rule_table.page(text) == text, rule_table.WHEN_STALE
    assert all(f"\n| {name} | " in text for name in RULES)


def test_a_stale_table_would_be_seen(monkeypatch):
    text = rule_table.PAGE.read_text(encoding="utf-8")
    monkeypatch.setitem(RULES, "another", RULES["sgd"])
    assert rule_table.page(text) != text


def test_two_rules_of_a_name_and_a_file_without_any_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "FILES", ("sgd", "sgd"))
    with pytest.raises(ImportError, match="a rule 'sgd' is in optimizers.rules.sgd"):
        registry.registered()
    with pytest.raises(ImportError, match="makes no Family"):
        registry.families("__init__")
