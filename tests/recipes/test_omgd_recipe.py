"""The OMGD recipe: what a run says of its masks, its table of memory, and its toy."""

import json

import pytest
from helpers.runs import corpus, here, refused

from recipes import omgd as recipe
from recipes import omgd_toy as toys

slow = pytest.mark.slow


# The recipe: memory, the toy (h), flags.


def test_seven_billion_parameters_take_what_the_paper_says():
    rows = recipe.memory(recipe.Memory(active=(2,)))
    gib = {name: [round(figure / 2**30, 2) for figure in row[:3]] for name, row in rows.items()}
    assert gib["AdamW"] == [12.55, 12.55, 25.10]
    assert gib["OMGD, 2 of 32 layers"] == [12.55, 1.24, 2.48]
    assert gib["GaLore, rank 128"] == [12.55, 12.55, 1.73]
    ours = rows["OMGD, 2 of 32 layers"]
    assert ours.segment < 0.31 * ours.gradients and ours.state == pytest.approx(2 * ours.moments, rel=1e-5)


@pytest.mark.run
def test_the_toy_tells_masks_of_a_traversal_from_masks_drawn_every_step(tmp_path):
    out = tmp_path / "toy"
    done = here(tmp_path, f"omgd toy --steps 20000 --seeds 6 --samples 200 --out {out}")
    assert done.code == 0, done.err
    found = json.loads((out / "toy.json").read_text())["rates"]
    assert (out / "toy.png").stat().st_size > 10_000
    assert all(way in done.out for way in toys.WAYS)
    for way in ("no mask", "wor, epochwise", "wor, joint"):
        assert found[way]["slope"] <= -1.8, found
    for way in ("iid, per step", "projection, per step"):
        assert -1.3 <= found[way]["slope"] <= -0.7, found
        assert found[way]["late"] > 15 * found["wor, epochwise"]["late"]
    assert found["iid, per epoch"]["late"] < 2 * found["wor, epochwise"]["late"]
    assert "--steps must be at least 20 epochs" in refused(here(tmp_path, "omgd toy --steps 10"), 2)


@slow
def test_the_toy_at_full_size(tmp_path):
    found = toys.toy(toys.Toy(steps=100_000, seeds=16, out=tmp_path))
    for way in ("wor, epochwise", "wor, joint"):
        assert found[way].slope <= -1.8
        assert found["iid, per step"].late > 15 * found[way].late
    assert -1.3 <= found["iid, per step"].slope <= -0.7
    assert found["wor, epochwise"].late == pytest.approx(2 * found["no mask"].late, rel=0.25)
    assert found["iid, per epoch"].late == pytest.approx(found["wor, epochwise"].late, rel=0.25)


@pytest.mark.run
def test_a_run_says_what_its_masks_give_up(tmp_path):
    tiny = (
        "omgd pretrain --data corpus.txt --sequence 16 --micro-batch 2 --steps 20 --size.hidden-size 16 "
        "--size.intermediate-size 24 --size.num-hidden-layers 4 --size.num-attention-heads 2 --dry-run "
    )
    corpus(tmp_path)
    done = here(tmp_path, tiny + "--active 2 --period 3step")
    assert done.code == 0 and "4 layers to choose from, 2 masks a cycle, each held for 3 steps" in done.out
    assert "a mask is held for 3 steps, and a pass over the data is" in done.err
    assert "the run ends 2 steps into a cycle of 6" in done.err
    whole = here(tmp_path, tiny + "--active 2 --period 1epoch")
    assert "samples are not paired" not in whole.err and "the run ends 20 steps into a cycle" in whole.err
    for flags, says in (
        ("--active 5", "active: got 5 of 4 layers"),
        ("--period 3", "expected a whole number and a unit"),
        ("--order joint", "expected 'keep'"),
        ("--by coordinates --over muon", "muon needs a matrix"),
        ("--choose norms --replacement", "--choose norms: got --replacement True, expected False"),
        ("--choose norms --no-reshuffle", "--choose norms: got --reshuffle False, expected True"),
        ("--choose norms --by tensors", "--choose norms: got --by tensors, expected layers"),
        ("--choose norms --scale-mode grad", "nothing to scale by; got scale_mode 'grad'"),
    ):
        assert says in refused(here(tmp_path, tiny + flags), 2)
    norms = here(tmp_path, tiny + "--active 2 --period 3step --choose norms")
    assert norms.code == 0 and "2 at a time by their gradient norms, each choice held for 3 steps" in norms.out
    assert "warning" not in norms.err, "there is no cycle that could end too early"
    lisa = here(tmp_path, tiny.replace("omgd pretrain", "baseline --optimizer lisa") + "--active 1 --period 5step")
    assert lisa.code == 0, lisa.err
