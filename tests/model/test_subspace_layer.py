"""The Linear that keeps x P: what it keeps and gives back, and where it may stand."""

import pytest
import torch
from helpers.models import llama
from helpers.subspace import make, matrices, randn
from reference import rso
from torch import Tensor, nn

from models.layers import Linear, attach, detach, merged, products

each_form = pytest.mark.parametrize("form", ["merged", "products"])


# The layer.


@each_form
@pytest.mark.parametrize("shape", [(512, 256), (4, 128, 256)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_keeps_x_p_alone_and_gives_the_gradient_of_b(form, shape, bias):
    x, w, p = randn(*shape).requires_grad_(), randn(384, 256, seed=1) / 16, randn(256, 32, seed=2) / 32**0.5
    offset = randn(384, seed=5).requires_grad_() if bias else None
    b = torch.zeros(()).expand(384, 32) if form == "merged" else torch.zeros(384, 32)
    b = b.detach().requires_grad_()
    given, kept = {t.untyped_storage().data_ptr() for t in (w, p, b)}, {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = {"merged": merged, "products": products}[form](x, w, offset, p, b)
    assert sum(kept.values()) == 512 * 32 * 4, "x P, an eighth of x"
    torch.testing.assert_close(y, (rso.forward(x, w, p, b) + (0 if offset is None else offset)).float())
    dy = randn(*y.shape, seed=3)
    gx, gb, *more = torch.autograd.grad(y, [x, b, *([offset] if bias else [])], dy)
    exact = rso.gradient_of_b(x, p, dy)
    assert (gb - exact).abs().max() < 1e-4 * exact.abs().max()
    torch.testing.assert_close(gx, rso.gradient_of_x(w, p, b, dy).float(), rtol=1e-4, atol=1e-5)
    if bias:
        torch.testing.assert_close(more[0], dy.flatten(0, -2).sum(0))


@each_form
def test_a_layer_without_numbers_for_p_is_plain(form):
    layer, x = Linear(8, 5), randn(3, 8)
    plain = layer(x)
    attach(layer, ["weight"], 2, form)
    assert layer.P.is_meta and layer.P.shape == (8, 2) and layer.B.is_meta and layer.B.shape == (5, 2)
    assert torch.equal(layer(x), plain)
    p, b = randn(8, 2), randn(5, 2)
    got = torch.func.functional_call(layer, {"P": p, "B": b}, (x,))
    expected = plain if form == "merged" else plain + x @ p @ b.T
    torch.testing.assert_close(got, expected)
    detach(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert list(layer.state_dict()) == ["weight"] and torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    ("names", "rank", "form", "named"),
    [
        (["0.weight"], 9, "merged", "0.weight: rank: got 9, expected .* its 8 inputs"),
        (["0.weight", "1.weight"], 2, "merged", "1.weight: got a parameter of LayerNorm"),
        (["0.bias"], 2, "merged", "0.bias: got a parameter of Linear"),
        (["2.weight"], 2, "merged", "2.weight: got a parameter of NonDynamicallyQuantizableLinear"),
        (["nothing.weight"], 2, "merged", "nothing.weight"),
        (["0.weight"], 2, "sum", "form: got 'sum'"),
    ],
)
def test_what_cannot_have_slots_is_named_and_nothing_changes(names, rank, form, named):
    odd = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), odd)
    with pytest.raises(ValueError, match=named):
        attach(net, names, rank, form)
    assert type(net[0]) is nn.Linear and len(list(net.parameters())) == 6


def test_the_names_of_model_and_optimizer_are_the_same():
    """The only contract between the two: ….P and ….B beside ….weight."""
    model = llama(1)
    step = make(model)
    slots = {name for name, p in model.named_parameters() if p.is_meta}
    assert slots == {n.removesuffix("weight") + s for n in matrices(model) for s in "PB"}
    trainable, frozen = step.optimizer.split(step.params, step.state)
    assert {**frozen, **trainable}.keys() == dict(model.named_parameters()).keys()
    assert (
        {n for n in trainable if n in slots}
        == {n for n in slots if n.endswith(".B")}
        == {n for n in trainable if step.optimizer.parameter_of(n) != n}
    )
    assert {n for n in frozen if n in slots} == {n for n in slots if n.endswith(".P")}
    for name in slots:
        assert step.tensors()[name].shape == dict(model.named_parameters())[name].shape
    assert [step.optimizer.parameter_of(n.removesuffix("weight") + "B") for n in matrices(model)] == matrices(model)
