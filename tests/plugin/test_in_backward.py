"""The update in backward: the same numbers as behind it, and the gradients of one layer at a time."""

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from helpers.grids import covering, few
from helpers.models import batches, llama
from helpers.plugged import STEPS, engine, facade, gradients, options, rate, same, same_state, toy, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from engine.memory import counted_peak
from optimizers import AdamW, InBackward, Masks, Subspaces, torch_optim
from optimizers.contract import UsageError
from optimizers.registry import RULES
from optimizers.routing import block

WRAPS = {"plain": None, "omgd": Masks(active=1, period=4), "rso": Subspaces(rank=2, period=5)}
BREAK, MICRO = 7, 2


def micro_batches(model, i):
    """Of step i: the whole gradient is their sum, in this order."""
    return [gradients(model, STEPS * j + i) for j in range(MICRO)]


def step(opt, model, i, how="counted"):
    for group in opt.param_groups:
        group["lr"] = rate(i)
    *first, last = micro_batches(model, i)
    for batch in first:
        if how == "counted":
            model(batch).backward()
        else:
            with opt.accumulating():
                model(batch).backward()
    model(last).backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize(("name", "wrap"), covering(RULES, WRAPS))
def test_twelve_steps_with_a_resume_are_those_of_the_optimizer_behind_backward(name, wrap):
    given = {"wrap": WRAPS[wrap]}
    theirs, mine = toy(), toy()
    how = "counted" if len(name) % 2 else "said"
    inside = InBackward(MICRO if how == "counted" else 1)
    behind, opt = facade(theirs, name, **given), facade(mine, name, in_backward=inside, **given)
    for i in range(STEPS):
        if i == BREAK:
            saved, trained = copy.deepcopy(opt.state_dict()), mine.state_dict()
            mine = toy()
            mine.load_state_dict(trained)
            opt = facade(mine, name, in_backward=inside, **given)
            opt.load_state_dict(saved)
        step(behind, theirs, i, how)
        step(opt, mine, i, how)
        assert same(weights(mine), weights(theirs)) and same_state(opt.named_state(), behind.named_state()), i
        assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert not same(weights(mine), weights(toy()))
    assert [g["count"] for g in opt.param_groups] == [STEPS] * len(opt.param_groups)


@pytest.mark.compiles
def test_compiled_it_runs_the_kernels_that_it_runs_behind_backward(backend):
    theirs, mine = toy(), toy()
    behind, opt = (
        facade(theirs, "snsm", compile=True),
        facade(mine, "snsm", compile=True, in_backward=InBackward(MICRO)),
    )
    for i in range(4):
        step(behind, theirs, i)
        step(opt, mine, i)
        assert same(weights(mine), weights(theirs)), i


@pytest.mark.parametrize("name", few(RULES, "sgd", "snsm"))
def test_clipping_is_that_of_the_engine_by_the_norm_of_the_step_before(name):
    theirs, mine = toy(), toy()
    inside = InBackward(clip_norm=0.5)
    engines, opt = engine(theirs, name, clip="previous", clip_norm=0.5), facade(mine, name, in_backward=inside)
    free = toy()
    unclipped = facade(free, name)
    for i in range(STEPS):
        if i == BREAK:
            saved, trained = copy.deepcopy(opt.state_dict()), mine.state_dict()
            mine = toy()
            mine.load_state_dict(trained)
            opt = facade(mine, name, in_backward=inside)
            opt.load_state_dict(saved)
        hypers = {
            group.name: {"lr": torch.tensor(rate(i)), "weight_decay": torch.tensor(group.weight_decay)}
            for group in engines.optimizer.owner.values()
        }
        engines([gradients(theirs, i)], hypers, i)
        for one, model in ((opt, mine), (unclipped, free)):
            for group in one.param_groups:
                group["lr"] = rate(i)
            model(gradients(model, i)).backward()
            one.step()
            one.zero_grad()
        torch.testing.assert_close(opt.param_groups[0]["previous_norm"], engines.previous, rtol=1e-6, atol=0)
        for n, p in mine.named_parameters():
            torch.testing.assert_close(p, theirs.get_parameter(n), rtol=1e-4, atol=1e-6, msg=n)
    if name == "sgd":  # which sees how large gradients are
        assert way(mine) < way(free) / 2


def way(model):
    """How far it has come."""
    return sum((p - q).norm().item() for p, q in zip(model.parameters(), toy().parameters(), strict=True))


def test_a_norm_is_left_behind_by_an_optimizer_that_does_not_clip():
    model = toy()
    opt = facade(model, "sgd", in_backward=InBackward(clip_norm=0.5))
    model(gradients(model, 0)).backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    other = facade(toy(), "sgd")
    other.load_state_dict(saved)
    assert "previous_norm" not in other.param_groups[0]
    again = facade(toy(), "sgd", in_backward=InBackward(clip_norm=0.5))
    again.load_state_dict(saved)
    assert torch.equal(again.param_groups[0]["previous_norm"], opt.param_groups[0]["previous_norm"])
    again.load_state_dict(other.state_dict())
    assert "previous_norm" not in again.param_groups[0]


class Alive:
    """The bytes of gradients that exist whenever one has come; made before the optimizer, whose hooks come after."""

    def __init__(self, model):
        self.params, self.peak = list(model.parameters()), 0
        for p in self.params:
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, p):
        self.peak = max(self.peak, sum(p.grad.nbytes for p in self.params if p.grad is not None))


def loss(model, i=0, run=lambda f, *x: f(*x)):
    (batch,) = batches(i)
    return run(model.loss, batch["input_ids"], batch["targets"])


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_one_layer_at_a_time_are_alive(tied):
    model = llama(4, tied)
    alive = Alive(model)
    opt = AdamW(model, in_backward=InBackward())
    loss(model).backward()
    assert all(p.grad is None for p in model.parameters()), "nothing is left for step"
    opt.step()
    layers = Counter()
    for n, p in model.named_parameters():
        layers[block(n)] += p.nbytes
    assert alive.peak == max(layers.values()) < sum(layers.values()) / 3


def test_a_step_needs_less_memory_by_what_the_gradients_of_other_layers_take():
    """Counted by the allocator, activations and all: from a graph that is there to the end of the step."""
    peaks = []
    for given in ({}, {"in_backward": InBackward()}):
        model = llama(6, hidden_size=128, intermediate_size=256)
        opt = torch_optim.SGD(model, momentum=0.0, **given)
        for i in range(2):
            total = loss(model, i)
            peak = counted_peak(lambda total=total, opt=opt: (total.backward(), opt.step(), opt.zero_grad()))
            del total
        peaks.append(peak)
    whole = sum(p.nbytes for p in model.parameters())
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    assert peaks[0] - peaks[1] > 0.9 * (whole - 2 * largest)


def test_what_got_no_gradient_and_what_was_given_by_hand_is_done_by_step():
    theirs, mine = toy(), toy()
    behind, opt = facade(theirs, "sumo"), facade(mine, "sumo", in_backward=InBackward())
    for model, one in ((theirs, behind), (mine, opt)):
        batch, used = gradients(model, 0), {n: p for n, p in model.named_parameters() if "layers.0.norm" not in n}
        torch.stack([(p * batch[n]).sum() for n, p in used.items()]).sum().backward()
        if one is opt:
            waiting = {n for n, p in model.named_parameters() if p.grad is not None}
            assert waiting == {n for n, _ in model.named_parameters() if "layers.0" in n and "norm" not in n}
        one.step()
        one.zero_grad()
        for n, p in model.named_parameters():
            p.grad = gradients(model, 1)[n]
        one.step()
        one.zero_grad()
    assert same(weights(mine), weights(theirs)) and same_state(opt.named_state(), behind.named_state())


def test_a_closure_may_run_backward():
    theirs, mine = toy(), toy()
    behind, opt = facade(theirs, "adamw"), facade(mine, "adamw", in_backward=InBackward())
    for model, one in ((theirs, behind), (mine, opt)):

        def closure(model=model, one=one):
            loss = model(gradients(model, 0))
            one.zero_grad()  # where Lightning has it
            loss.backward()
            return loss

        for _ in range(3):
            assert one.step(closure).requires_grad
    assert same(weights(mine), weights(theirs)) and all(p.grad is None for p in mine.parameters())
    assert opt.param_groups[0]["count"] == 3


def test_gradients_that_are_thrown_away_do_not_count():
    theirs, mine = toy(), toy()
    behind, opt = facade(theirs, "adamw"), facade(mine, "adamw", in_backward=InBackward(MICRO))
    mine(gradients(mine, 99)).backward()
    opt.zero_grad()
    step(behind, theirs, 0)
    step(opt, mine, 0)
    assert same(weights(mine), weights(theirs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant):
    theirs, mine = toy(), toy()
    batch = gradients(theirs, 0)
    behind, opt = facade(theirs, "adamw"), facade(mine, "adamw", in_backward=InBackward())

    def twice(model):
        x = torch.ones(1, requires_grad=True)
        run = lambda x: model(batch) * x  # noqa: E731
        return checkpoint(run, x, use_reentrant=reentrant) + checkpoint(run, x, use_reentrant=reentrant)

    twice(theirs).sum().backward()
    behind.step()
    if reentrant:
        with pytest.raises(UsageError, match="use_reentrant=False"):
            twice(mine).sum().backward()
        return
    twice(mine).sum().backward()
    opt.step()
    assert same(weights(mine), weights(theirs))


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    model = toy()
    opt = facade(model, "adamw", in_backward=InBackward(clip_norm=1.0))
    for i in range(3):
        total = model(gradients(model, i))
        with Waits() as waits:
            total.backward()
            opt.step()
            opt.zero_grad()
        assert waits.count == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_hooks_of_its_own(copier):
    model = toy()
    opt = facade(model, "sumo", in_backward=InBackward(MICRO, clip_norm=0.5), wrap=Masks(active=1, period=3))
    for i in range(5):
        step(opt, model, i)
    twin, other = copier((model, opt))
    before = weights(model)
    for i in range(5, 9):
        step(other, twin, i)
    assert same(before, weights(model))
    for i in range(5, 9):
        step(opt, model, i)
    assert same(weights(model), weights(twin))


def test_hooks_keep_nothing_alive_and_do_nothing_without_their_optimizer():
    model = toy()
    opt = facade(model, "adamw", in_backward=InBackward())
    gone, before = weakref.ref(opt), weights(model)
    del opt
    gc.collect()
    assert gone() is None
    model(gradients(model, 0)).backward()
    assert same(before, weights(model)) and all(p.grad is not None for p in model.parameters())


def test_parameters_that_come_later_have_hooks():
    model, added = toy(), nn.Parameter(torch.ones(3))
    opt = facade(model, "adamw", in_backward=InBackward())
    opt.add_param_group({"params": [("more", added)]})
    (model(gradients(model, 0)) + added.sum()).backward()
    assert added.grad is None and all(p.grad is None for p in model.parameters())
    opt.step()
    assert {g["count"] for g in opt.param_groups} == {1}


def begun(**given):
    model = toy()
    opt = facade(model, "adamw", in_backward=InBackward(**given))
    model(gradients(model, 0)).backward()
    return model, opt


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "load_state_dict", "add_param_group"])
def test_what_is_refused_inside_of_a_step(how):
    _, opt = begun()
    asked = {
        "state_dict": opt.state_dict,
        "deepcopy": lambda: copy.deepcopy(opt),
        "load_state_dict": lambda: opt.load_state_dict(facade(toy(), "adamw").state_dict()),
        "add_param_group": lambda: opt.add_param_group({"params": [("a", nn.Parameter(torch.zeros(2)))]}),
    }[how]
    with pytest.raises(UsageError, match=r"call step\(\) first"):
        asked()
    opt.step()
    asked()


def test_what_is_refused():
    for given, match in (({"micro_batches": 0}, "at least 1"), ({"clip_norm": 0.0}, "a norm above 0")):
        with pytest.raises(UsageError, match=match):
            InBackward(**given)
    model, opt = begun()
    with pytest.raises(UsageError, match="got one more gradient"):
        model(gradients(model, 1)).backward()
    model, opt = begun()
    with pytest.raises(UsageError, match="got one more gradient"), opt.accumulating():
        model(gradients(model, 1)).backward()
    model, opt = begun()
    opt.param_groups[0]["lr"] = 0.1
    with pytest.raises(UsageError, match="changed between backward and step"):
        opt.step()
    opt = facade(toy(), "adamw", in_backward=InBackward(2))
    with pytest.raises(UsageError, match="one of the two"), opt.accumulating():
        pass
    model = toy()
    opt = facade(model, "adamw", in_backward=InBackward(), wrap=Masks(active=1, period=3))
    model.requires_grad_(True)
    with pytest.raises(UsageError, match="leave requires_grad to the optimizer"):
        model(gradients(model, 0)).backward()


def test_a_scaler_is_refused():
    model, scaler = toy(), torch.amp.GradScaler("cpu")
    opt = facade(model, "adamw", in_backward=InBackward())
    scaler.scale(model(gradients(model, 0))).backward()
    with pytest.raises(UsageError, match="GradScaler"):
        scaler.step(opt)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="2 processes"):
        torch_optim.AdamW(toy(), in_backward=InBackward(), **options("adamw"))
