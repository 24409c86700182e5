"""Subsets of any tensor, and stacks of matrices under Subset-Norm and Subspace-Momentum."""

import pytest
import torch
from helpers.matrices import decaying, hyper, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers import linalg
from optimizers.linalg import projections
from optimizers.random import Key
from optimizers.rules.snsm import (
    adam_sn,
    grouped,
    snsm,
    sums,
)

KINDS = projections.KINDS


# subsets ------------------------------------------------------------------------------------------------------------


shapes = st.lists(st.integers(1, 12), max_size=4).map(tuple)
subsets = st.one_of(st.sampled_from(["heuristic", "sqrt", "coordinate"]), st.integers(1, 60), st.integers(-9, -1))


@given(shapes, subsets)
def test_subsets_partition_the_entries_of_any_tensor(shape, subset):
    g = randn(*shape) + 0.1
    w = sums(g, subset)
    torch.testing.assert_close(w.sum(), g.square().sum())
    view = grouped(g, subset)
    assert torch.broadcast_shapes(w.shape, view.shape) == view.shape, "it must divide the numerator as it is"
    if subset == "coordinate" or (subset == "heuristic" and len(shape) < 2):
        assert w.shape == g.shape
    elif subset == "heuristic":
        assert w.numel() * min(shape[-2:]) == g.numel()
    else:
        bound = g.numel() ** 0.5 if subset == "sqrt" else subset if subset > 0 else g.numel() ** 0.5 / -subset
        k = g.numel() // w.numel()
        assert k == max(d for d in range(1, g.numel() + 1) if g.numel() % d == 0 and d <= max(1, bound))


@given(shapes, subsets.filter(lambda s: s != "coordinate"), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50)
def test_any_tensor_can_be_moved(shape, subset, dtype):
    p = randn(*shape).to(dtype)
    rule = adam_sn(subset=subset)
    delta, slots = rule.update(p, rule.init(p), p, hyper(0.01, 0.1))
    assert delta.shape == p.shape and delta.dtype == torch.float32 and delta.isfinite().all()
    assert all(s.dtype in (torch.float32, torch.float64) and s.is_contiguous() for s in slots.values())
    assert (delta.sign() == -p.sign()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_matrices_moves_as_its_matrices_do(kind):
    """Expert stacks: leading dimensions are a batch, for the subsets and for the projections."""
    stack = torch.stack([decaying(9, 6, seed=i) for i in range(3)]).to(torch.bfloat16)
    rule = snsm(2, proj_type=kind)
    slots, ok = rule.refresh(stack, rule.init(stack), Key(5))
    assert ok
    delta, new = rule.update(stack, slots, stack, hyper(0.01))
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in slots.items()}
    for i in range(3):
        one = {k: v if v.ndim < 2 else v[i] for k, v in slots.items()}
        torch.testing.assert_close(rule.update(stack[i], one, stack[i], hyper(0.01))[0], delta[i])


@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_expert_does_not_stop_a_refresh(kind):
    """A stack in which one matrix got no token, hence no gradient."""
    stack = torch.stack([decaying(140, 150), torch.zeros(140, 150)])
    slots, ok = snsm(4, proj_type=kind).refresh(stack, snsm(4, proj_type=kind).init(stack), Key(5))
    assert ok and all(s.isfinite().all() for s in slots.values())
    if "basis" in slots:
        assert torch.allclose(slots["basis"][0].mT @ slots["basis"][0], torch.eye(4), atol=1e-5)
        waits = kind != "random"  # that one has the same for both
        assert linalg.missing(slots["basis"]).flatten().tolist() == [False, waits]
