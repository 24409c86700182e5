"""--optimizer NAME in every recipe that trains: its options are flags, and no flag is accepted that does nothing."""

import contextlib
import dataclasses
import io
import json
import re
from typing import Any

import pytest
from helpers.grids import covering, few

from optimizers.contract import UsageError, idle
from optimizers.registry import RULES
from recipes.config import TrainConfig
from recipes.registry import config_class, from_plain, parsed, trained_by
from tests.support import RULES as ONE_A_FILE
from tools import plan

RECIPES = ("baseline", "snsm demo", "sumo demo", "omgd pretrain", "rso demo")
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def asked(line: str) -> Any:
    return parsed(line.split(), "--to")


def shown(line: str) -> str:
    """What --help says, on one line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        asked(f"{line} --help")
    assert end.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", out.getvalue()).split())


@pytest.mark.parametrize(("recipe", "name"), covering(RECIPES, RULES))
def test_every_rule_can_be_asked_for_and_comes_back_from_what_is_saved(recipe, name):
    config = asked(f"{recipe} --optimizer {name}")
    assert config.optimizer == name and type(config.options) is RULES[name].options
    assert config.rule().name == name and config.rule().options == config.options
    saved = json.loads(json.dumps(config.plain()))
    assert saved["optimizer"] == name and saved["options"].keys() == vars(config.options).keys()
    again = from_plain(config_class(saved["recipe"]), saved)
    assert again == dataclasses.replace(config, lr_of="")


@pytest.mark.parametrize(("recipe", "name"), covering(RECIPES, ["galore", "muon", "sumo"]))
def test_help_shows_the_options_of_the_rule_that_is_asked_for(recipe, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    said = shown(f"{recipe} --optimizer {name}")
    kind = config_class(asked(recipe).plain()["recipe"])
    own = {field.name for field in dataclasses.fields(RULES[name].options)}
    others = {f.name for family in RULES.values() for f in dataclasses.fields(family.options)} - own
    offered = set(re.findall(r"(--[\w.-]+)(?= [A-Z{]|, --no-)", said))
    assert {kind.flag_of(option) for option in own} <= offered
    assert not {kind.flag_of(option) for option in others - {f.name for f in dataclasses.fields(kind)}} & offered
    assert all(rule in said for rule in RULES)
    assert RULES[name].options.__doc__ not in said


@pytest.mark.parametrize("name", few(RULES, *ONE_A_FILE))
def test_every_option_has_help(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    said = shown(f"baseline --optimizer {name}")
    for field in dataclasses.fields(RULES[name].options):
        assert re.search(rf"{TrainConfig.flag_of(field.name)}( \S+|, --no-\S+)+? [A-Z\"a-z][\w-]*:? ", said), field.name
        text = said[said.index(f"{TrainConfig.flag_of(field.name)}") :].partition("(default")[0]
        assert len(re.findall(r"\b[a-z]{2,}\b", text)) >= 4, text


@pytest.mark.run
@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("omgd pretrain --over galore --rank 4", "omgd pretrain --optimizer galore --rank 4"),
        ("rso demo --inner=galore --inner-rank 4", "rso demo --optimizer galore --inner-rank 4"),
        ("snsm demo --method adam_sn", "snsm demo --optimizer adam_sn"),
        ("sumo demo --profile recommended", "sumo demo"),
        ("sumo demo --profile paper --rank 4", "sumo demo --optimizer sumo_paper --rank 4"),
        ("sumo demo --profile=release", "sumo demo --optimizer sumo_release"),
        ("sumo demo --beta 0.9", "sumo demo --momentum 0.9"),
        ("omgd pretrain --over sgd --optimizer muon", "omgd pretrain --optimizer muon"),
    ],
)
def test_other_names_of_flags_mean_the_same_and_help_says_so(other, same):
    assert asked(other) == asked(same)
    recipe, flag = re.match(r"(\S+(?: \w+)?) (--\w+)", other).groups()
    assert flag in shown(recipe)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("snsm demo --scale 0.5", "--scale: snsm has no such option, galore has"),
        ("baseline --optimizer galore --no-nesterov", "--no-nesterov: galore has no such option, sgd, muon"),
        ("baseline --active 1", "--active: adamw has no such option, lisa has"),
        ("omgd pretrain --rank 4", "--rank: adamw has no such option, galore, snsm"),
        ("rso demo --inner-rank 4", "--inner-rank: adamw has no such option, galore, snsm"),
        ("snsm demo --method adam_sn --rank 4", "--rank: changes nothing under adam_sn"),
        ("snsm demo --numerator ema --moments keep", "--moments: changes nothing under snsm"),
        ("sumo demo --refresh-below 0.1 --update-proj-gap 7", "--update-proj-gap: changes nothing under sumo"),
        ("baseline --optimizer muon --orthogonalize exact --optimizer-steps 3", "--optimizer-steps: changes nothing"),
        ("baseline --match lm_head", "--match: AdamW trains everything here"),
        ("baseline --optimizer galore --rank 4 --optimizer muon", "--rank: muon has no such option"),
        ("baseline --optimizer galor --rank 4", "--optimizer: got 'galor', expected one of adamw, sgd, muon, scale"),
        ("snsm demo --optimizer lisa", "--optimizer: got 'lisa', expected one of adamw, sgd"),
        ("sumo condition --optimizer galore", "--optimizer: got 'galore', expected one of sumo, sumo_paper"),
        ("sumo demo --profile best", "--profile: got 'best', expected one of recommended, paper, release"),
        ("sumo demo --beta 1", "sumo: --momentum must lie in [0, 1), got 1.0"),
        ("rso demo --inner sgd --nesterov --momentum 0", "sgd: --nesterov needs a momentum above 0"),
        ("rso demo --inner galore --update-proj-gap 0", "galore: --update-proj-gap must be at least 1, got 0"),
    ],
)
def test_what_changes_nothing_or_cannot_be_is_refused_by_name(line, said):
    with pytest.raises(UsageError, match=f"^--to: {re.escape(said)}"):
        asked(line)


def test_idle_options_change_no_step():
    """What is refused as changing nothing does change nothing: of each rule that says so, in every such case."""
    import torch

    seen = set()
    for name, changes in (
        ("snsm", {"numerator": "ema"}),
        ("snsm", {"second": "none"}),
        ("snsm", {"correct_bias": False}),
        ("snsm", {"betas": (0.0, 0.9)}),
        ("snsm", {"betas": (0.9, 0.0)}),
        ("sumo", {"rho": 0.0}),
        ("sumo", {"refresh_below": 1e9}),
        ("muon", {"orthogonalize": "exact"}),
    ):
        other = {"rank": 2, "update_proj_gap": 7, "proj_type": "svd", "moments": "keep", "subset": "sqrt", "eps": 1e-2}
        other |= {"correct_complement": False, "perpendicular": "normalized", "steps": 2, "dtype": "float32"}
        other |= {"numerator": "ema", "second": "coordinate"}
        family = RULES[name]
        rank = {"rank": 4} if name != "muon" else {}
        first = family.default(**rank, **changes)
        for option in idle(first) - {"compat"}:
            seen.add(option)
            moved = []
            for options in (first, dataclasses.replace(first, **{option: other[option]})):
                assert options != first or not moved
                made, p = family.of(options), torch.zeros(8, 12)
                slots, hyper = made.init(p), {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.0)}
                for step in range(3):
                    g = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
                    if made.refresh is not None and step % made.gap == 0:
                        slots, _ = made.refresh(g, slots, step)
                    delta, slots = made.update(g, slots, p, hyper)
                    p = p + delta
                moved.append(p)
            assert torch.equal(*moved), (name, changes, option)
    assert seen >= {
        "rank",
        "update_proj_gap",
        "subset",
        "eps",
        "correct_complement",
        "perpendicular",
        "steps",
        "numerator",
    } | {"second"}


def test_rank_and_gap_go_with_the_preset_and_all_else_with_the_rule():
    config = asked("snsm 60m --optimizer galore")
    assert config.options == RULES["galore"].default(rank=128, update_proj_gap=100)
    assert asked("sumo demo --optimizer sumo_release").options == RULES["sumo_release"].default(
        rank=48, update_proj_gap=50
    )
    assert asked("rso demo --inner galore").options == RULES["galore"].default(rank=12, update_proj_gap=50)
    assert asked("baseline --optimizer sgd").options == RULES["sgd"].default(momentum=0.95, nesterov=True)
    with pytest.raises(UsageError, match="not known; give one of adamw"):
        TrainConfig(optimizer="adamm")


def test_a_run_says_when_its_rate_was_chosen_for_another_rule():
    def said(line: str) -> list[str]:
        return TrainConfig.notes(asked(line), None, None)

    (line,) = said("snsm demo --optimizer muon")
    assert "--lr 0.015" in line and "for snsm" in line and "for muon" in line
    assert not said("snsm demo") and not said("snsm demo --optimizer muon --lr 1e-2")
    assert not said("snsm demo --optimizer muon --lr=1e-2")


@each_recipe
def test_options_of_another_rule_are_refused(recipe):
    config = dataclasses.replace(asked(recipe), options=RULES["sgd"].default())
    with pytest.raises(UsageError, match="another rule's"):
        config.check()


def test_what_the_planner_proposes_can_be_typed():
    for line, smaller, flags in (
        ("baseline --optimizer galore", {"rank": 24}, "--rank 24"),
        ("baseline --optimizer lisa", {"active": 1}, "--active 1"),
        ("rso demo --inner galore", {"rank": 6}, "--inner-rank 6"),
        ("baseline --optimizer sgd --no-nesterov", {"nesterov": True}, "--nesterov"),
    ):
        before = asked(line)
        after = dataclasses.replace(before, options=dataclasses.replace(before.options, **smaller))
        assert plan.changed(before, after) == flags
        assert asked(f"{line.removesuffix(' --no-nesterov')} {flags}").options == after.options
    proposed = [list(group) for group in plan.candidates(asked("baseline --optimizer galore"))]
    assert [c.options.rank for c in proposed[-1]] == [24, 12, 6]
    none = [list(group) for group in plan.candidates(asked("snsm demo --method adam_sn"))]
    assert {c.options.rank for group in none for c in group} == {48}, "a smaller rank would change nothing"


class Saved:
    """A checkpoint, as far as its config goes."""

    path = "step-00000001"

    def __init__(self, config: dict[str, Any]) -> None:
        self.trainer = {"config": config}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": None}, "no options: saved before .* train a step with --resume"),
        ({"optimizer": "adamm"}, "does not know"),
        ({"optimizer": 3}, "optimizer: got 3"),
        ({"optimizer": "sgd"}, "options: got .*, which sgd does not have"),
        ({"options": {"rank": "many"}}, "rank: got 'many'"),
        ({"options": {"rnk": 4}}, "which galore does not have"),
        ({"options": {"betas": [0.9]}}, "betas: got"),
    ],
)
def test_saved_settings_that_cannot_be_read_are_refused_by_a_line(change, said):
    from engine.checkpoint import CheckpointError

    config = json.loads(json.dumps(asked("baseline --optimizer galore").plain()))
    assert trained_by(Saved(config)).options == asked("baseline --optimizer galore").options
    with pytest.raises(CheckpointError, match=said):
        trained_by(Saved({**config, **change}))


def test_a_checkpoint_from_before_options_is_refused():
    """As the version before saved it: every rule's settings among the recipe's own."""
    from engine.checkpoint import CheckpointError

    old = {"recipe": "baseline", "optimizer": "galore", "rank": 4, "update_proj_gap": 7, "lr": 1e-3}
    with pytest.raises(CheckpointError, match="saved before a rule's settings were kept apart"):
        trained_by(Saved(old))
