"""RSO in somebody's own loop: the engine's steps, from the whole gradient, and the engine's state."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.close import assert_follows
from helpers.grids import few
from helpers.models import batches, llama
from helpers.plugged import options, same, same_state, weights
from helpers.runs import ROOT
from helpers.subspace import DECAY, LR, PERIOD, RANK, dense, hypers, matrices
from torch.func import functional_call

from engine.checkpoint import CheckpointError
from engine.checkpoint.plugged import load_state, save_state
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from optimizers import AdamW, Masks, Subspaces, torch_optim
from optimizers.contract import UsageError
from optimizers.random import fold
from optimizers.registry import RULES
from optimizers.wrappers.rso import rso

STEPS = 30
KEY = fold(0, "optimizer")


def facade(model, name="adamw", wrap=None):
    named = dict(model.named_parameters())
    own = matrices(model)
    groups = [
        {"params": [(n, named[n]) for n in own], "rule": name, "weight_decay": DECAY, "name": "own"},
        {"params": [(n, p) for n, p in named.items() if n not in own], "rule": "adamw", "name": "rest"},
    ]
    return torch_optim.optimizer(name)(groups, lr=LR, wrap=wrap or Subspaces(rank=RANK, period=PERIOD), **options(name))


def facade_step(opt, model, i):
    opt.zero_grad()
    (batch,) = batches(i)
    loss = model.loss(batch["input_ids"], batch["targets"])
    loss.backward()
    opt.step()
    return loss.item()


def engine(model, name="adamw"):
    params, names = dict(model.named_parameters()), matrices(model)
    optimizer = rso(dense(model, RULES[name](**options(name))), params, names, RANK, PERIOD, KEY)
    attach(model, names, RANK)
    return Step(cut(model), params, optimizer, optimizer.init(params), mode="off", logits=97 * 8, key=KEY)


SINGLE = [name for name in RULES if RULES[name](**options(name)).elementwise]


@pytest.mark.run
@pytest.mark.parametrize("name", few(SINGLE, "adamw", "sgd"))
def test_thirty_steps_with_turns_and_a_resume_are_those_of_the_engine(name, tmp_path):
    theirs, mine = llama(), llama()
    step, opt = engine(theirs, name), facade(mine, name)
    way = {n: np.zeros(p.shape) for n, p in mine.named_parameters()}
    for i in range(STEPS):
        if i in (PERIOD, 10):
            saved, trained = copy.deepcopy(opt.state_dict()), mine.state_dict()
            mine = llama()
            mine.load_state_dict(trained)
            opt = facade(mine, name)
            opt.load_state_dict(saved)
        if i == 20:  # through the files of either side
            save_state(opt, tmp_path / "optimizer.safetensors")
            opt = facade(mine, name)
            assert load_state(opt, tmp_path / "optimizer.safetensors") == i
        before = weights(theirs)
        step.switch(i)
        expected = step(batches(i), hypers(step.optimizer), i).loss.item()
        assert facade_step(opt, mine, i) == pytest.approx(expected, rel=1e-6), i
        for n, p in weights(theirs).items():
            if n in way:
                way[n] += np.abs((p - before[n]).numpy())
                assert_follows(mine.get_parameter(n).detach(), p.numpy(), way[n], said=f"{n} after {i}")


@pytest.mark.parametrize("name", few(RULES, "sumo"))
def test_a_step_of_any_rule_is_that_of_the_engine(name):
    """As a tensor: what orthogonalises multiplies the rounding of small directions, step after step."""
    theirs, mine = llama(), llama()
    step, opt, before = engine(theirs, name), facade(mine, name), weights(llama())
    step(batches(0), hypers(step.optimizer), 0)
    facade_step(opt, mine, 0)
    for n in matrices(mine):
        moved = theirs.get_parameter(n).detach() - before[n]
        assert (mine.get_parameter(n).detach() - before[n] - moved).norm() <= 3e-4 * moved.norm() and moved.any(), n


def test_the_state_of_the_engine_is_taken_over_to_the_bit():
    theirs, mine = llama(), llama()
    step, opt = engine(theirs), facade(mine)
    for i in range(4):
        step.switch(i)
        step(batches(i), hypers(step.optimizer), i)
    mine.load_state_dict({n: p.detach() for n, p in step.params.items()})
    opt.load_named_state(step.state, 4)
    assert same_state(opt.named_state(), step.state)
    assert opt.metadata == dict(step.optimizer.metadata) and "rso.rank" in opt.metadata
    assert {n: group.rule.name for n, group in opt.owners().items()} == {
        n: group.rule.name for n, group in step.optimizer.owner.items()
    }


def test_what_it_finds_and_what_it_holds():
    model = llama()
    opt = AdamW(model, wrap=Subspaces(rank=RANK))
    assert {n for n, slots in opt.named_state().items() if "P" in slots} == {*matrices(model)}
    some = AdamW(model, wrap=Subspaces(rank=RANK, pattern=r"up_proj"))
    assert {n for n, slots in some.named_state().items() if "P" in slots} == {n for n in matrices(model) if "up_" in n}
    with pytest.raises(UsageError, match="finds no matrix"):
        AdamW(model, wrap=Subspaces(rank=RANK, pattern="no such"))
    with pytest.raises(UsageError, match=r"rank <= in, got rank 400"):
        AdamW(model, wrap=Subspaces(rank=400))
    with pytest.raises(UsageError, match="expected the form 'merged'"):
        AdamW(model, wrap=lambda base, params, key: rso(base, params, matrices(model), RANK, 4, key, "products"))
    state = sum(t.numel() * 4 for n in matrices(model) for t in opt.named_state()[n].values())
    whole = sum(2 * p.numel() * 4 for n, p in model.named_parameters() if n in matrices(model))
    assert state < whole / 2


def test_a_state_of_other_subspaces_is_refused(tmp_path):
    file = tmp_path / "optimizer.safetensors"
    save_state(facade(llama()), file)
    for other in (Subspaces(rank=RANK, period=PERIOD + 1), Masks(active=1, period=2)):
        with pytest.raises(CheckpointError, match="same wrapper and seed"):
            load_state(facade(llama(), wrap=other), file)
    with pytest.raises(CheckpointError, match="was saved under|was trained by"):
        load_state(AdamW(llama()), file)


def test_a_decay_that_comes_later_is_refused_and_one_that_changes_is_not():
    model = llama()
    opt = facade(model)
    opt.param_groups[0]["weight_decay"] = 2 * DECAY
    facade_step(opt, model, 0)
    opt.param_groups[1]["weight_decay"] = DECAY
    with pytest.raises(UsageError, match="expected 0 as when"):
        facade_step(opt, model, 1)


def test_masks_over_subspaces():
    def both(base, params, key):
        return Masks(active=1, period=4)(Subspaces(rank=RANK, period=PERIOD)(base, params, key), params, key)

    model = llama()
    opt = facade(model, wrap=both)
    for i in range(9):
        facade_step(opt, model, i)
        held = {n for n, slots in opt.named_state().items() if "P" in slots}
        assert held == {n for n in matrices(model) if model.get_parameter(n).requires_grad} and len(held) == 7
    twin = facade(llama(), wrap=both)
    twin.load_state_dict(opt.state_dict())
    assert same(*({f"{n}/{s}": t for n, x in o.named_state().items() for s, t in x.items()} for o in (opt, twin)))


def kept(model, params):
    """Bytes that autograd keeps of a forward of (4, 128) tokens, for what is trained aside."""
    own, saved = {p.untyped_storage()._cdata for p in params.values()}, {}

    def pack(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    tokens = torch.zeros(4, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional_call(model, params, (tokens,))
    return sum(storage.nbytes() for where, storage in saved.items() if where not in own)


def test_what_a_loop_keeps_for_backward_and_the_engine_does_not():
    """The figures of docs/plugin.md."""
    model = llama(4, hidden_size=256, intermediate_size=688, max_position_embeddings=128)
    names = matrices(model)
    opt = AdamW(model, wrap=Subspaces(rank=64))
    loop = kept(model, dict(model.named_parameters()))
    attach(model, names, 64)
    frozen = {n.removesuffix("weight") + "P": slots["P"] for n, slots in opt.named_state().items() if n in names}
    frozen |= {n: model.get_parameter(n).detach() for n in names}
    moved = {
        n.removesuffix("weight") + "B": torch.zeros(len(model.get_parameter(n)), 64, requires_grad=True) for n in names
    }
    engine = kept(model, {**dict(model.named_parameters()), **frozen, **moved})
    text = (ROOT / "docs" / "plugin.md").read_text()
    assert f"{loop / 2**20:.1f} MiB in a loop, {engine / 2**20:.1f} in the engine" in text, (
        loop / 2**20,
        engine / 2**20,
    )


def test_every_setting_changes_something():
    changed = {"rank": 3, "period": 2, "pattern": "up_proj", "projection": "haar", "moments": "keep", "prox": 0.5}
    changed |= {"warmup": 3, "share": (("q_proj", "k_proj", "v_proj"),)}
    assert {"", *changed} == {"", *(field.name for field in dataclasses.fields(Subspaces))}
    moved = {}
    for setting, value in {"": None, **changed}.items():
        model = llama(1)
        given = {"rank": RANK, "period": PERIOD} | ({setting: value} if setting else {})
        opt = AdamW(model, lr=LR, wrap=Subspaces(**given))
        for i in range(PERIOD + 2):
            facade_step(opt, model, i)
        moved[setting] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert [setting for setting in changed if torch.equal(moved[""], moved[setting])] == []
