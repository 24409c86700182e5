"""A step says which parameter's gradient is not finite."""

import pytest
import torch
from helpers.steps import hypers, make
from torch import Tensor, nn

from models.segment import Segment


class Root(nn.Module):
    """x * sqrt(weight): at weight 0 the gradient of the weight is infinite, and that of x is 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] if x is None else x) * self.weight.sqrt()


def call(module: nn.Module, x: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    return module(x, batch)


def total(module: nn.Module, x: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
    return module(x, batch).sum()


class Roots(nn.ModuleList):
    def segments(self) -> list[Segment]:
        kinds = [("first", call), *[("middle", call)] * (len(self) - 2), ("last", total)]
        return [
            Segment(kind, module, {"weight": f"{i}.weight"}, function)
            for i, (module, (kind, function)) in enumerate(zip(self, kinds, strict=True))
        ]


def roots(module: nn.ParameterDict, batch: dict[str, Tensor]) -> Tensor:
    return sum(p.sqrt().sum() for p in module.values())


@pytest.mark.parametrize("named", ["a", "b", "c"])
def test_the_parameter_of_a_segment_without_a_finite_gradient_is_named(named):
    module = nn.ParameterDict({name: torch.tensor([1.0, 0.0 if name == named else 1.0]) for name in "abc"})
    result = make(module, loss=roots)([{}], hypers(0), 0)
    assert result.first_nonfinite() == named


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ((1, 1, 1, 1), None),
        ((0, 1, 1, 1), "0.weight"),
        ((1, 0, 1, 1), "1.weight"),
        ((1, 1, 0, 1), "2.weight"),
        ((1, 1, 1, 0), "3.weight"),
        ((1, 0, 1, 0), "3.weight"),
    ],
)
def test_the_first_parameter_in_backward_order_without_a_finite_gradient_is_named(weights, named, recompute):
    step = make(Roots([Root(float(w)) for w in weights]), recompute=recompute)
    result = step([{"x": torch.ones(3)}], hypers(0), 0)
    assert result.first_nonfinite() == named
    assert result.norm.isfinite().item() == (named is None)
