"""Who trains what in the baseline recipe, and how to ask for something else."""

import pytest
import torch

from models.llama import Llama, LlamaConfig
from optimizers.contract import UsageError
from optimizers.partition import partition
from recipes.baseline import Baseline

PARAMS = dict(Llama(LlamaConfig(32, 16, 16, 2, 2, max_position_embeddings=8)).named_parameters())


def owners(config: Baseline) -> dict[str, str]:
    config.check()
    return {name: group.rule.name for name, group in partition(PARAMS, config.groups(PARAMS)).owner.items()}


def test_embedding_norms_and_head_are_adamws_unless_asked_otherwise() -> None:
    default = owners(Baseline(optimizer="muon"))
    assert {n for n, rule in default.items() if rule == "muon"} == {n for n in PARAMS if "_proj" in n}
    assert set(owners(Baseline(optimizer="sgd", match=("",))).values()) == {"sgd"}
    head = owners(Baseline(optimizer="muon", match=("_proj", "lm_head", "embed")))
    assert {n for n, rule in head.items() if rule == "adamw"} == {n for n, p in PARAMS.items() if p.ndim == 1}


@pytest.mark.parametrize(("pattern", "message"), [("no_such", "matches no parameter"), ("(", "no regular expression")])
def test_a_pattern_that_owns_nothing_is_an_error(pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        owners(Baseline(optimizer="muon", match=("_proj", pattern)))


def test_a_pattern_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="--match: AdamW trains everything"):
        owners(Baseline(match=("_proj",)))
    assert owners(Baseline(match=("lm_head",), rest_lr=1e-2))["lm_head.weight"] == "adamw"


def test_every_parameter_has_state_under_every_rule() -> None:
    for optimizer in Baseline.rules():
        config = Baseline(optimizer=optimizer)
        if hasattr(config.options, "rank"):
            config = Baseline(optimizer=optimizer, options=Baseline.rules()[optimizer].default(rank=4))
        state = partition(PARAMS, config.groups(PARAMS)).init(PARAMS)
        assert state.keys() == PARAMS.keys()
        assert all(isinstance(t, torch.Tensor) for slots in state.values() for t in slots.values())
