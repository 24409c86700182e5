"""A rule on a convolution's weight is that rule on the matrix (out, in k k)."""

import pytest
import torch
from helpers.matrices import hyper, randn

from optimizers.flattened import flattened
from optimizers.random import Key
from optimizers.registry import RULES
from tests.support import small

SHAPE = (12, 4, 3, 3)


@pytest.mark.parametrize("name", ["muon", "galore", "snsm", "sumo"])
def test_a_convolution_moves_as_its_matrix(name: str) -> None:
    rule = small(RULES[name])
    wrapped, p = flattened(rule), randn(*SHAPE)
    own, matrix = wrapped.init(p), rule.init(p.flatten(1))
    for step in range(3):
        g = randn(*SHAPE, seed=step + 1)
        if rule.refresh and wrapped.refresh and not step:
            own, ok = wrapped.refresh(g, own, Key(3))
            matrix, _ = rule.refresh(g.flatten(1), matrix, Key(3))
            assert bool(ok)
        moved, own = wrapped.update(g, own, p, hyper(0.1, 0.01))
        expected, matrix = rule.update(g.flatten(1), matrix, p.flatten(1), hyper(0.1, 0.01))
        assert moved is not None and expected is not None
        assert moved.shape == p.shape and moved.flatten(1).equal(expected)
        assert all(t.equal(matrix[slot]) for slot, t in own.items())
    assert wrapped.export is not None and rule.export is not None and wrapped.adopt is not None
    moments = wrapped.export(own, p)
    assert moments.first is not None and moments.first.shape == p.shape
    assert moments.first.flatten(1).equal(rule.export(matrix, p.flatten(1)).first)
    if moments.second is not None:
        again, _ = wrapped.adopt(moments, wrapped.init(p), p, Key(3))
        assert {slot: t.shape for slot, t in again.items()} == {slot: t.shape for slot, t in own.items()}


def test_what_moves_each_entry_by_itself_stays_as_it_is() -> None:
    rule = small(RULES["sgd"])
    assert flattened(rule) is rule
    vector, wrapped = randn(5), flattened(small(RULES["muon"]))
    with pytest.raises(ValueError, match="matri"):
        wrapped.init(vector)
    assert torch.equal(wrapped.init(randn(4, 5))["momentum_buffer"], torch.zeros(4, 5))
