"""Mixed precision, bfloat16 weights, and stochastic rounding of their steps."""

import pytest
import torch
from helpers.models import LR, batches, distance, llama
from helpers.steps import DECAY, EPS, hypers, make, run
from reference.baselines import AdamW
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from optimizers.random import Key
from optimizers.rules.sgd import sgd

slow = pytest.mark.slow


# Precision.


def test_mixed_precision_is_a_bf16_model_with_fp32_weights_and_gradients():
    model, reference = llama(1), llama(1)
    step = make(model, sgd(momentum=0.9), compute_dtype=torch.bfloat16, logits=2**24)
    optimizer = torch.optim.SGD(reference.parameters(), lr=LR, momentum=0.9)
    for i in range(3):
        (batch,) = batches(i)
        halves = {name: p.to(torch.bfloat16) for name, p in reference.named_parameters()}
        logits = functional_call(reference, halves, (batch["input_ids"],))
        assert logits.dtype == torch.bfloat16
        optimizer.zero_grad()
        cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=-100).backward()
        optimizer.step()
        step([batch], hypers(i, LR, 0.0), i)
    assert all(p.dtype == torch.float32 for p in step.params.values())
    assert distance(step.params, dict(reference.named_parameters())) < 1e-4


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"]).float().flatten(0, 1)
    return cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100)


def test_bf16_weights_move_by_adam_in_fp32_and_are_rounded_once():
    """As a chain of one, so that the gradients, in bf16, are the same bits on both sides."""
    model, reference = llama(1).bfloat16(), llama(1).bfloat16()
    step = make(model, loss=mean_loss)
    params = dict(reference.named_parameters())
    replays = {name: AdamW(eps=EPS) for name in params}
    for i in range(3):
        (batch,) = batches(i)
        grads = torch.autograd.grad(mean_loss(reference, batch), list(params.values()))
        for (name, p), g in zip(params.items(), grads, strict=True):
            p.data.copy_(replays[name].step(p.detach(), g, LR, DECAY))
        step([batch], hypers(i, LR), i)
        for name, p in step.params.items():
            torch.testing.assert_close(p, params[name], rtol=2**-7, atol=0)  # at most one rounding apart
            assert (p == params[name]).float().mean() > 0.99, name
            params[name].data.copy_(p)
    assert all(p.dtype == torch.bfloat16 for p in step.params.values())
    for slots in step.state.values():
        assert slots["exp_avg"].dtype == slots["exp_avg_sq"].dtype == torch.float32


class Straight(nn.Module):
    """Loss = sum of all entries, so every gradient is 1."""

    def __init__(self, count: int = 100_000) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(count, dtype=torch.bfloat16)) for _ in range(2))


def straight(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model.a.float().sum() + model.b.float().sum()) * batch["one"]


@pytest.mark.parametrize("mode", ["off", pytest.param("segments", marks=slow)])
def test_stochastic_rounding_is_right_on_average_and_repeatable(mode):
    def moved(rounding: bool, key: int = 1, steps: int = 4) -> Straight:
        torch._dynamo.reset()
        model = Straight()
        step = make(model, sgd(0.0), straight, mode=mode, stochastic_rounding=rounding, key=Key(key))
        for i in range(steps):
            step([{"one": torch.tensor(1.0)}], hypers(i, 1e-3, 0.0), i)
        return model

    assert moved(False).a.eq(1).all(), "the update is a quarter of an ulp: to nearest it is lost"
    once, model, again = moved(True, steps=1), moved(True), moved(True)
    assert abs(once.a.double().mean() - 0.999) < 5 * 2**-8 * 0.5 / 100_000**0.5
    assert abs(model.a.double().mean() - 0.996) < 5 * 2**-8 * 1.0 / 100_000**0.5
    assert model.a.unique().numel() > 2, "each step draws its own numbers"
    assert model.a.equal(again.a) and model.b.equal(again.b)
    both = torch.corrcoef(torch.stack([once.a, once.b]).float())
    assert abs(both[0, 1]) < 0.02, "each tensor draws its own numbers"
    assert not model.a.equal(moved(True, key=2).a)


def test_bf16_with_stochastic_rounding_trains_a_llama_the_same_way_twice():
    first, second = (run(make(llama(1).bfloat16(), stochastic_rounding=True)) for _ in range(2))
    assert all(p.equal(second.params[name]) for name, p in first.params.items())
    assert first.losses == second.losses
