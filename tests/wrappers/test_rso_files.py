"""RSO from and to files, in bfloat16, in a foreign module; what cannot be done is named."""

import pytest
import torch
from helpers.grids import covering
from helpers.models import batches, copied, llama
from helpers.subspace import LR, PERIOD, hypers, make, randn, run
from torch import Tensor, nn

from engine.checkpoint import load, save
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd
from optimizers.wrappers.rso import SHARED, rso
from tools.generate import load_model

FORMS = ["merged", "products"]
each_form = pytest.mark.parametrize("form", FORMS)


# The optimizer.


@each_form
def test_bf16_weights_move_by_less_than_they_resolve(form):
    """Right on average, by stochastic rounding: at each step where merged, at the merge where not."""
    ones = torch.ones(512, 512, dtype=torch.bfloat16)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
            self.layer.weight.data.copy_(ones)

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return module.layer(batch["x"]).float().sum()

    def moved(rounding: bool) -> Tensor:
        model = Sum()
        params = dict(model.named_parameters())
        base = partition(params, [Group("rest", sgd(0.0), ("",), 1.0)])
        optimizer = rso(base, params, params, 512, 1, form=form, projection="coordinate")  # P = I
        attach(model, params, 512, form)
        key = dict(stochastic_rounding=rounding, key=Key(3))
        step = Step(cut(model, objective), params, optimizer, optimizer.init(params), mode="off", **key)
        assert all(s.dtype == torch.float32 for n, s in step.state["layer.weight"].items() if n != "P")
        rate = hypers(optimizer, 2.0**-10)
        for i in range(4):  # each step moves every weight by a quarter of half a unit in the last place
            step.switch(i)
            step([{"x": torch.ones(1, 512, dtype=torch.bfloat16)}], rate, i)
        step.switch(4)
        return model.layer.weight.detach()

    w = moved(True)
    assert w.dtype == torch.bfloat16 and w.unique().numel() > 1
    assert abs(w.double().mean() - (1 - 4 * 2.0**-10)) < 5 * 2.0**-8 / 512
    assert torch.equal(w, moved(True))
    if form == "merged":
        assert moved(False).eq(1).all(), "to nearest, every step is lost"


@pytest.mark.parametrize(("form", "share"), covering(FORMS, [(), SHARED]))
def test_a_checkpoint_in_the_middle_of_a_period_goes_on_bitwise(tmp_path, form, share):
    straight = make(llama(2), form, options={"share": share})
    run(straight, 4 * PERIOD - 1)
    first = make(llama(2), form, options={"share": share})
    run(first, PERIOD + 1)
    path = save(tmp_path, PERIOD + 1, first.params, first.state, {"config": {}}, llama(2).config.to_hf(), {})
    saved = load(path)
    model = llama(2)
    second = make(model, form, options={"share": share})
    expected = second.optimizer.init(second.params, PERIOD + 1)
    shapes = [
        {n: {k: (t.shape, t.dtype) for k, t in s.items()} for n, s in state.items()}
        for state in (expected, saved.state)
    ]
    assert shapes[0] == shapes[1]
    q, k = (saved.state[f"model.layers.1.self_attn.{n}_proj.weight"]["P"] for n in "qk")
    assert (q is k) == bool(share), "what was one stays one, so that x P is kept once"
    for name, p in second.params.items():
        p.detach().copy_(saved.params[name])
    second.state.update(copied(saved.state))
    run(second, 3 * PERIOD - 2, PERIOD + 1)
    for name, p in straight.params.items():
        assert torch.equal(second.params[name], p), name
        assert all(torch.equal(second.state[name][k], t) for k, t in straight.state[name].items()), name


@each_form
def test_generation_reads_the_merged_weights(tmp_path, form):
    model = llama(2)
    step = make(model, form)
    run(step, PERIOD + 2)
    path = save(
        tmp_path, 5, step.params, step.state, {"config": {}}, model.config.to_hf(), dict(step.optimizer.metadata)
    )
    (batch,) = batches(3)
    expected, count = step.chain.loss(step.tensors(), batch)
    read = load_model(path, torch.device("cpu"))
    got = read.loss(batch["input_ids"], batch["targets"]) * count
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    if form == "products":
        (path / "optimizer.safetensors").unlink()
        bare = load_model(path, torch.device("cpu"))
        assert abs((bare.loss(batch["input_ids"], batch["targets"]) * count - expected).item()) > 1e-3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(form="sum"), "form must be one of .* got 'sum'"),
        (dict(projection="normal"), "projection must be one of"),
        (dict(moments="rotate"), "moments must be one of"),
        (dict(period=0), "period must be at least 1"),
        (dict(prox=-1.0), "prox and warmup at least 0, got 200, -1.0 and 0"),
        (dict(warmup=-1), "prox and warmup at least 0, got 200, 0.0 and -1"),
        (dict(names=["x.bias"]), "got the name 'x.bias'"),
        (dict(names=["y.weight"]), "got the name 'y.weight'"),
        (dict(rank=7), r"x.q.weight: .* got rank 7 and shape \(8, 6\)"),
        (dict(share=(("q", "k"),)), "x.k.weight cannot share x.q\\+k's P"),
        (dict(rule=galore(2), moments="transform"), "galore have a basis of their own"),
    ],
)
def test_what_cannot_be_done_is_named(change, named):
    params = {"x.q.weight": randn(8, 6), "x.k.weight": randn(8, 7), "x.bias": randn(8)}
    change = dict(change)
    rule = change.pop("rule", sgd())
    base = partition(params, [Group("all", rule, ("",), LR)])
    given = dict(names=["x.q.weight", "x.k.weight"], rank=3) | change
    with pytest.raises(UsageError, match=named):
        rso(base, params, **given)
    with pytest.raises(UsageError, match="in a random subspace already"):
        rso(rso(base, params, ["x.q.weight"], 3), params, ["x.q.weight"], 2)


# The engine: gradients, graphs, memory.


def test_a_foreign_module_trains_under_rso():
    """Its nn.Linear layers, as a chain of one; biases and the rest by their own rule."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
    params, names = dict(net.named_parameters()), ["0.weight", "3.weight"]
    base = partition(params, [Group("rso", adamw(), (r"^[03]\.weight",), LR), Group("rest", adamw(), ("",), LR)])
    optimizer = rso(base, params, names, 4, 10, Key(2))
    attach(net, names, 4)
    step = Step(
        cut(net, lambda module, batch: nn.functional.cross_entropy(module(batch["x"]), batch["y"])),
        params,
        optimizer,
        optimizer.init(params),
        mode="off",
    )
    x = randn(64, 6)
    batch, start = {"x": x, "y": (x[:, 0] > 0).long()}, {n: p.detach().clone() for n, p in params.items()}
    losses = []
    for i in range(60):
        step.switch(i)
        losses.append(step([batch], hypers(step.optimizer), i).loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in params.items())
    assert nn.functional.cross_entropy(net(x), batch["y"]).item() < losses[-1] + 0.01, "called plainly, it is trained"
