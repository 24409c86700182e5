"""The one place that applies a rule: a tensor moved alone, in a dict and by the compiled kernel is the same tensor."""

import pytest
import torch
from torch import Tensor

from optimizers.apply import add, move, update
from optimizers.contract import Group, Kind, Rule, declare
from optimizers.kernel import make_kernel
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

HYPER = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.01)}


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=draw).to(dtype), torch.randn(6, 4, generator=draw).to(dtype)


@pytest.mark.parametrize("clip", ["none", "tensor", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_moves_the_same_alone_and_in_a_kernel(clip, dtype):
    (p, g), rule = tensors(dtype), adamw()
    slots, bound, seed = rule.init(p), torch.tensor(0.5), torch.tensor([7], dtype=torch.int32)
    given = {} if clip == "none" else {"bound": bound}
    moved, new, square = move(rule, g, slots, p, HYPER, clip=clip, seed=seed[0], **given)
    q, held = p.clone(), {slot: t.clone() for slot, t in slots.items()}
    squares = make_kernel([rule], clip)([g], [held], [q], [HYPER], bound, seed)
    assert torch.equal(q, moved) and torch.equal(squares[0], square) and not torch.equal(p, moved)
    assert all(torch.equal(held[slot], t) for slot, t in new.items())
    assert square.item() == pytest.approx(float(g.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("clip", "bound", "factor"), [("tensor", 0.5, None), ("tensor", 1e9, 1.0), ("scale", 0.3, 0.3)]
)
def test_what_a_rule_is_given_is_clipped(clip, bound, factor):
    p, g = tensors()
    expected = 0.5 / float(g.norm()) if factor is None else factor
    moved, _, square = move(GRADIENT, g, {}, p, HYPER, clip=clip, bound=torch.tensor(bound))
    torch.testing.assert_close(moved, p + expected * g)
    assert float(square) == pytest.approx(float(g.square().sum()), rel=1e-6), "before clipping"


def test_what_stays_is_the_old_tensor():
    p, g = tensors()
    still = Rule("still", None, declare(count=Kind.COUNTER), dict, lambda g, slots, p, hyper: (None, slots))
    slots = {"count": torch.zeros(())}
    moved, new, _ = move(still, g, slots, p, HYPER)
    assert moved is p and new["count"] is slots["count"]


def test_named_tensors_move_by_their_owners_and_nothing_is_written():
    p, g = tensors()
    params = {"a": p, "b": p.clone()}
    groups = [Group("own", GRADIENT, ("a",), 0.1), Group("rest", adamw(), ("",), 0.1)]
    optimizer = partition(params, groups)
    state, hyper = optimizer.init(params), {"own": HYPER, "rest": HYPER}
    before = p.clone()
    moved, new = update(optimizer, {"a": g}, state, params, hyper)
    assert torch.equal(moved["a"], add(p, g)) and moved["b"] is params["b"] and new["b"] is state["b"]
    assert torch.equal(params["a"], before)


GRADIENT = Rule("gradient", None, (), lambda p: {}, lambda g, slots, p, hyper: (g.float(), slots))
