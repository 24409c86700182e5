"""GPT-2 by the recipes: settings of the paper, a run that is killed, and what reads its checkpoint."""

import json
import sys

import pytest
from helpers.grids import few
from helpers.runs import TINY, assert_identical, corpus, here, interrupted, killed, newest, refused, tool

from models import weights
from models.gpt2 import Gpt2
from models.gpt2_config import Gpt2Config
from recipes import baseline, omgd
from recipes.build import build
from recipes.registry import config_class, from_plain

RUN = f"omgd gpt2 {TINY} --active 1 --period 4step --turn-warmup 3 --eval-every 10"


def test_the_preset_is_the_paper_s_run() -> None:
    """arXiv 2603.05960, section 5.4 and B.4; what the code says where the paper does not."""
    config = omgd.parse(["gpt2-paper"])
    assert isinstance(config, omgd.Gpt2)
    run = build(config, 50257)
    assert run.model.num_parameters() == 124_439_808
    assert config.micro_batch * config.accumulation * config.sequence == 491_520
    assert (config.steps, config.warmup, config.lr, config.lr * config.floor) == (
        100_000,
        2000,
        6e-4,
        pytest.approx(6e-5),
    )
    assert (config.weight_decay, config.options.betas, config.clip, config.clip_norm) == (0.1, (0.9, 0.95), "global", 1)
    said = json.loads(run.optimizer.metadata["traversal"])
    assert (said["each"], said["period"], said["warmup"], said["masks"]) == (3, 100, 1000, 4)
    decayed = {name for name, group in run.optimizer.owner.items() if group.weight_decay}
    assert decayed == {name for name, p in run.params.items() if p.ndim == 2}
    full = baseline.parse(["gpt2-paper"])
    assert (full.lr, full.options.betas, full.optimizer) == (6e-4, (0.9, 0.95), "adamw")
    assert baseline.parse(["gpt2", "--optimizer", "lisa"]).options.betas == (0.9, 0.95)


def test_the_default_ends_with_whole_cycles_and_its_config_comes_back() -> None:
    for recipe, kind in ((omgd, "omgd-gpt2"), (baseline, "baseline-gpt2")):
        config = recipe.parse(["gpt2"])
        run = build(config, 257)
        assert 10e6 < run.model.num_parameters() < 12e6
        assert not [note for note in run.notes if "into a cycle" in note]
        assert from_plain(config_class(kind), config.plain()) == config


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("end", few(["interrupted", "killed"], "interrupted"))
def test_a_run_that_was_cut_off_goes_on_to_the_bit_and_is_read_by_the_tools(tmp_path, end: str) -> None:
    corpus(tmp_path)
    line = f"{RUN} --save-every 5"
    if end == "killed":
        killed(tmp_path, f"{line} --out parts", "parts/step-00000010")
    else:
        interrupted(tmp_path, f"{line} --out parts", 11)
    for name, more in (("parts", " --resume auto"), ("straight", "")):
        done = here(tmp_path, f"{line} --out {name}{more}")
        assert done.code == 0, done.err
    assert_identical(tmp_path / "parts", tmp_path / "straight")
    saved = newest(tmp_path / "straight")
    assert isinstance(weights.parsed(saved.model_config), Gpt2Config)

    said = tool(tmp_path, "tools.generate straight --prompt the --max-new-tokens 8 --temperature 0")
    assert said.code == 0 and said.out.startswith("the"), said.err
    assert tool(tmp_path, "tools.export straight exported").code == 0
    read = weights.load(tmp_path / "exported")
    assert isinstance(read, Gpt2)
    assert all(p.equal(saved.params[name]) for name, p in read.named_parameters())
    looked = tool(tmp_path, "tools.inspect straight --json")
    assert looked.code == 0, looked.err
    report = json.loads(looked.out)
    assert report["traversal"]["active"] and "turn_rate" in looked.out

    tiny = TINY.split("--size")[0]
    begun = here(tmp_path, f"baseline gpt2 {tiny} --init exported --out begun --steps 2 --eval-first")
    assert begun.code == 0, begun.err
    assert "is not trained here; GPT-2 is by recipes.omgd gpt2" in refused(
        here(tmp_path, f"baseline {tiny} --init exported --out no"), 2
    )


@pytest.mark.run
def test_what_no_gpt2_has_is_refused(tmp_path) -> None:
    corpus(tmp_path)
    for flags, said in (
        ("--size.num-key-value-heads 1", "--size.num-key-value-heads: got 1, which no GPT-2 has"),
        ("--size.tie-word-embeddings False", "--size.tie-word-embeddings: got False, which no GPT-2 has"),
        ("--size.num-attention-heads 3", "hidden_size: got 16, expected a multiple of num_attention_heads = 3"),
        ("--match nothing", "matches no parameter"),
        ("--turn-warmup 3", "--turn-warmup: adamw has no such option, lisa has"),
        ("--optimizer lisa --turn-warmup -1", "--turn-warmup: got -1"),
    ):
        assert said in refused(here(tmp_path, f"baseline gpt2 {TINY} {flags} --rest-lr 1e-3 --dry-run"), 2)


@pytest.mark.compiles
def test_a_plan_knows_it_compiled(tmp_path) -> None:
    done = tool(corpus(tmp_path), "tools.plan omgd gpt2 --active 1 --sequence 64 --micro-batch 1 --clip none --json")
    assert done.code == 0, done.err
    asked, weights_ = json.loads(done.out)["asked"], 4 * 11_139_456
    assert asked["weights"] == weights_ and asked["bytes"] < 4 * weights_, (
        "of all, in the mask's warm-up, but gradients"
    )
