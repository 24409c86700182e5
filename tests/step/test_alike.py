"""Segments of one kind share a template; those that differ in anything are run as what they are."""

import functools

import pytest
import torch
from helpers.modules import Stack, data, first, make, middle, times, whole
from torch import Tensor, nn

from engine.step.templates import difference, kinds
from models.segment import Segment


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


class Odd(nn.Module):
    """A block that reads everything that an attribute can be."""

    def __init__(self, **given) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, 6)
        self.scale, self.sizes, self.act, self.table = 1.0, (1, 2), twice, torch.ones(6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.extra = [nn.Flatten(0, 0)]
        self.options = {"shift": 0.0, "nested": [1.0]}
        self.layer = 0
        self.register_buffer("shift", torch.full((6,), given.pop("buffered", 0.0)), persistent=False)
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.linear(x)) * self.scale * self.table + sum(self.sizes) + self.options["nested"][0]
        return x + self.inner(self.extra[0](y)) + self.options["shift"] + self.shift


UNEQUAL = {
    "scale": dict(scale=0.5),
    "sizes.1": dict(sizes=(1, 3)),
    "act": dict(act=thrice),
    "table": dict(table=torch.full((6,), 2.0)),
    "options.nested.0": dict(options={"shift": 0.0, "nested": [4.0]}),
    "inner._modules": dict(inner=nn.Sequential(nn.Linear(6, 6))),
    "inner.1": dict(inner=nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    "extra.0": dict(extra=[nn.ReLU()]),
    "unknown": dict(unknown=1),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("path", UNEQUAL)
def test_blocks_that_differ_are_run_as_what_they_are(path, recompute):
    model = Stack([Odd(), Odd(**UNEQUAL[path])])
    step = make(model, recompute=recompute)
    assert list(step.chain.apart) == ["block 2"] and step.chain.apart["block 2"].endswith(path)
    (batch,) = data(0)
    expected = whole(model, batch)[0].item()
    assert step.chain.loss(step.tensors(), batch)[0].item() == pytest.approx(expected, rel=1e-6)
    assert step([batch]).loss.item() == pytest.approx(expected / 8, rel=1e-6)


def test_blocks_that_are_alike_share_a_template_whatever_their_numbers():
    blocks = [Odd(), Odd(buffered=3.0), Odd(act=twice)]
    blocks[0].linear.weight.data.mul_(2)
    model = Stack(blocks)
    step = make(model)
    assert not step.chain.apart and set(step.chain.forwards) == {"stem", "block", "head"}
    (batch,) = data(0)
    assert step.chain.loss(step.tensors(), batch)[0].item() == pytest.approx(whole(model, batch)[0].item(), rel=1e-6)


def segment(module: nn.Module, call=middle, **options) -> Segment:
    return Segment("block", module, {n: n for n, _ in module.named_parameters()}, call, **options)


def hooked() -> nn.Module:
    block = Odd()
    block.linear.register_forward_hook(lambda module, given, out: out + 1)
    return block


def tied() -> nn.Module:
    block = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    block[1].weight = block[0].weight
    return block


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (segment(Odd()), segment(Odd(), first), "call"),
        (segment(Odd(), lambda m, x, b: m(x)), segment(Odd(), lambda m, x, b: 2 * m(x)), "call"),
        (segment(Odd(act=times(2))), segment(Odd(act=times(3))), "module.act.factor"),
        (segment(Odd(), functools.partial(middle)), segment(Odd(), functools.partial(first)), "call.func"),
        (segment(Odd()), segment(hooked()), "module.linear._forward_hooks"),
        (segment(Odd()), segment(Odd().eval()), "module.training"),
        (segment(nn.Linear(6, 6)), segment(nn.Linear(6, 6, bias=False)), "module._parameters"),
        (segment(tied()), segment(nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in "ab"])), "tied parameters"),
        (segment(Odd(layer=0)), segment(Odd(layer=1)), "module.layer"),
        (segment(Odd(layer=0), ignore=("layer",)), segment(Odd(layer=1), ignore=("layer",)), None),
        (segment(Odd(act=times(2))), segment(Odd(act=times(2))), None),
        (segment(Odd(scale=float("nan"))), segment(Odd(scale=float("nan"))), None),
    ],
)
def test_a_difference_is_named(one, other, named):
    assert difference(one, other) == named or str(difference(one, other)).startswith(f"{named}.")
    assert len(set(kinds([one, other, one])[0])) == (1 if named is None else 2)
