"""Memory under masks, counted: state, gradients and activations of what is active, and a backward that stops."""

import pytest
import torch
from helpers.masks import KEY, SIZES, everything, held, hypers, make, masked, text
from helpers.models import few_tokens, llama
from torch import Tensor

from engine.memory import counted_peak
from engine.step import backward
from engine.step.step import Step
from optimizers.contract import state_bytes
from optimizers.rules.adamw import adamw
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    Groups,
    tensors,
    traversal,
)

pytestmark = pytest.mark.run  # allocations are counted, which is slow


def test_state_is_that_of_the_active_set_before_and_after_two_cycles():
    step = masked(3)
    everything_ = dict(step.params)
    active = sum(p.numel() for n, p in everything_.items() if ".layers." not in n)
    active += sum(p.numel() for n, p in everything_.items() if ".layers.0." in n) * 3
    for i in range(17):
        step.switch(i)
        step(few_tokens(1), hypers(step.optimizer, i), i)
        scalars = sum(4 + 16 + (4 if "scale" in slots else 0) for slots in step.state.values())  # clock, scale
        assert held(step) == 8 * active + scalars, i
        assert held(step) < 0.4 * held(masked(None)), "of all"


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_one_active_segment_at_a_time(recompute):
    step = masked(3)
    trainable, frozen = step.optimizer.split(step.params, step.state)
    for name, p in step.params.items():
        p.requires_grad_(name in trainable)
    seen: list[dict[str, Tensor]] = []
    pass_ = backward.recomputed if recompute else backward.stored
    with step.chain.draws.of(KEY):
        pass_(step.chain, step.params, few_tokens(1), torch.tensor(1.0), lambda grads: seen.append(dict(grads)))
    assert {name for grads in seen for name in grads} == set(trainable) and not set(trainable) & set(frozen)
    assert sum(map(bool, seen)) == 5, "embedding, head and three blocks"
    most = max(sum(g.numel() for g in grads.values()) for grads in seen)
    assert most == sum(p.numel() for name, p in step.params.items() if ".layers.0." in name)


def peak(step: Step, data: list[dict[str, Tensor]]) -> int:
    for i in range(2):
        step(data, hypers(step.optimizer, i), i)
    return counted_peak(lambda: step(data, hypers(step.optimizer, 2), 2))


def test_a_step_holds_no_gradient_of_what_is_frozen_and_fewer_activations():
    block = 4 * sum(p.numel() for name, p in masked(None).params.items() if ".layers.0." in name)
    assert peak(masked(3, recompute=True), few_tokens(1)) < 3 * block, "a block's gradients, temporaries of an update"
    full, some = (peak(masked(active), text(8)) for active in (None, 3))
    assert some < 0.80 * full, some / full


def test_no_backward_below_the_lowest_segment_that_trains():
    model = llama(6, **SIZES)
    params = dict(model.named_parameters())
    top = ("model.norm.weight", "lm_head.weight")
    groups = Groups("layers", ("top", "rest"), (top, tuple(name for name in params if name not in top)))
    masks = traversal(groups, KEY, active=1, period=1, reshuffle=False)
    step = make(model, omgd(everything(params, adamw()), params, masks))
    head, rest = (next(t for t in (2, 3) if masks.active(t) == (i,)) for i in (0, 1))
    peaks, losses = {}, {}
    for i in range(4):
        step.switch(i)
        peaks[i] = counted_peak(lambda i=i: losses.update({i: step(text(8), hypers(step.optimizer, i), i).loss}))
        lowest = step.chain.lowest(step.tensors())
        assert lowest == (step.chain.last if masks.active(i) == (0,) else 0)
    assert peaks[head] < 0.3 * peaks[rest]
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_tensors_that_rest_are_let_go_before_the_next_segment(recompute):
    """State is that of what trains; of two micro-batches, too, no gradient is held but of that."""
    model = llama(3, **SIZES)
    params = dict(model.named_parameters())
    masks = traversal(tensors(params, balance="numel"), KEY, keep=0.5, period=1)
    optimizer = omgd(everything(params, adamw()), params, masks)
    step = make(model, optimizer, mode="segments", recompute=recompute, compiler=lambda function: function)
    trainable, _ = optimizer.split(step.params, step.state)
    asked = {name for name, p in step.tensors().items() if p.requires_grad}
    assert asked > set(trainable) and len(asked) > 1.5 * len(trainable)
    used, into_each = backward.accumulate, list[set[str]]()

    def accumulate(into, more, *rest):
        used(into, more, *rest)
        into_each.append(set(into))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "accumulate", accumulate)
        result = step([*text(1), *text(1)], hypers(optimizer, 0), 0)
    seen = {name for names, _ in result.squares for name in names}
    assert seen == set(trainable) == set().union(*into_each)
    assert held(step) < 0.55 * sum(map(state_bytes, everything(params, adamw()).init(params).values()))
