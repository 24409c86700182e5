"""Who trains embedding, head, norms and biases, and what that takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from optimizers.contract import UsageError, total_bytes
from optimizers.rules.sumo import sumo
from recipes.baseline import Baseline
from recipes.build import build
from recipes.config import Size
from recipes.rso import Rso
from recipes.snsm import Snsm
from recipes.sumo import Sumo

TIED = Size(num_hidden_layers=2, tie_word_embeddings=True)
UNTIED = Size(num_hidden_layers=2, tie_word_embeddings=False)
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def owners(config):
    run = build(config, 257)
    return run.optimizer.owner, run.optimizer.init(run.params)


@pytest.mark.parametrize("recipe", [Sumo, Baseline, Rso, Snsm])
@pytest.mark.parametrize(
    ("rest", "embedding", "head"),
    [("adamw", "adamw", "adamw"), ("adam_sn", "adam_sn", "adam_sn"), ("scale", "scale", "scale"), ("same", "", "")],
)
def test_each_is_trained_by_what_was_asked_for(recipe, rest, embedding, head):
    config = recipe(rest=rest, rest_lr=0.5, size=UNTIED, **({"optimizer": "muon"} if recipe is Baseline else {}))
    config = replace(config, optimizer="muon", options=None) if recipe is Rso and rest == "same" else config
    owner, state = owners(config)
    own = config.rule().name
    assert owner[EMBEDDING].rule.name == (embedding or own) and owner[EMBEDDING].lr == 0.5
    assert owner[HEAD].rule.name == (own if recipe is Snsm else head or own)
    assert owner[NORM].rule.name == "adamw" and owner[NORM].weight_decay == 0 and owner[NORM].lr == 0.5
    if rest == "scale":
        assert owner[EMBEDDING].rule.options.each == "column" and state[EMBEDDING] == {}
        assert recipe is Snsm or owner[HEAD].rule.options.momentum == 0.9
    assert all("_proj" in name for name, group in owner.items() if group.lr != 0.5 and name != HEAD)


def test_a_tied_embedding_is_the_head():
    owner, state = owners(Sumo(rest="scale", size=TIED))
    assert HEAD not in owner and owner[EMBEDDING].rule.options == owner[EMBEDDING].rule.options.__class__(momentum=0.9)
    assert state[EMBEDDING]["momentum_buffer"].shape == (257, 192)


def test_by_default_it_is_as_it_was():
    owner, _ = owners(Baseline(size=UNTIED))
    assert {group.name for group in owner.values()} == {"adamw", "adamw-norms"}
    owner, _ = owners(Sumo(size=UNTIED))
    assert {group.name for group in owner.values()} == {"sumo", "adamw-norms", "adamw-rest"}


def test_what_changes_nothing_is_refused():
    with pytest.raises(UsageError, match="--rest same: changes nothing where --optimizer is adamw"):
        Baseline(rest="same").check()


MEGABYTES = {  # of state, of a LLaMA of 134 M parameters under SUMO of rank 64: the table in docs/memory.md
    "adamw": (438.2, 219.1, 115.6),
    "adam_sn": (241.8, 120.9, 65.7),
    "scale": (143.3, 71.6, 40.7),
    "same": (61.8, 30.9, 20.3),
}


@pytest.mark.parametrize("rest", MEGABYTES)
def test_the_bytes_of_the_docs(rest):
    page = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    assert f"| `{rest}` | {' | '.join(f'{n:.1f}' for n in MEGABYTES[rest])} |" in page
    for moments, expected in zip(("fp32", "bf16", "int8"), MEGABYTES[rest], strict=True):
        own = {"moments_dtype": moments, "bases_dtype": "fp32" if moments == "fp32" else "bf16"}
        run = build(Sumo(model="130m", options=sumo.default(rank=64), rest=rest, **own), 32_000)
        assert total_bytes(run.optimizer.init(run.params)) / 1e6 == pytest.approx(expected, abs=0.06)
