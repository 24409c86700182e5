"""Any nn.Module trains: its modes, its buffers and what it draws are those of plain PyTorch, whatever the chain."""

import copy

import pytest
import torch
from helpers.modules import (
    EPS,
    LR,
    Stack,
    data,
    equal,
    make,
    stack,
    tensors,
    whole,
)
from torch import Tensor, nn

from engine.step.step import Step
from optimizers.contract import UsageError
from optimizers.random import Key
from optimizers.rules.sgd import sgd

slow = pytest.mark.slow


# Modes.


@pytest.mark.parametrize("chain", [False, True], ids=["one", "segments"])
@pytest.mark.parametrize("mode", [True, False], ids=["model.train()", "model.eval()"])
def test_evaluation_is_in_evaluation_mode_and_training_in_training_mode(mode, chain):
    model = stack().train(mode)
    step = make(model, loss=None if chain else whole)
    before = tensors(step)
    (batch,) = data(0)
    found = [step.chain.loss(step.tensors(), batch) for _ in range(3)]
    assert equal(before, tensors(step)), "evaluating changes nothing"
    reference = copy.deepcopy(model).eval()
    for total, count in found:
        assert count == 8 and total.item() == pytest.approx(whole(reference, batch)[0].item(), rel=1e-6)
    assert model.training is mode, "the user's module stays as it was"
    step([batch])
    assert not step.buffers["blocks.0.norm.running_mean"].equal(before["blocks.0.norm.running_mean"])
    trained = {step([batch], {"all": {"lr": torch.tensor(0.0)}}).loss.item() for _ in range(3)}
    assert len(trained) == 3, "dropout draws in training"


def test_what_was_in_evaluation_mode_on_purpose_stays_in_it():
    model = stack(0.0).train()
    for block in model.blocks:
        block.norm.eval()
    step = make(model)
    before = tensors(step)
    for i in range(3):
        step.chain.loss(step.tensors(), data(i)[0])
        step(data(i))
    assert all(step.buffers[n].equal(before[n]) for n in step.buffers)
    assert not step.params["blocks.0.norm.weight"].equal(before["blocks.0.norm.weight"])


# Buffers.


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("mode", "recompute"), [("off", False), ("off", True), pytest.param("segments", True, marks=slow)]
)
def test_each_segment_has_its_own_buffers_and_writes_them_once(mode, recompute, accumulation):
    model, reference = stack(0.0), stack(0.0)
    step = make(model, mode=mode, recompute=recompute)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, eps=EPS, weight_decay=0.1)
    for i in range(4):
        batches = data(i, accumulation)
        optimizer.zero_grad()
        sum(whole(reference, b)[0] / (8 * accumulation) for b in batches).backward()
        optimizer.step()
        step(batches)
    assert step.buffers.keys() == {n for n, _ in model.named_buffers()}
    assert step.buffers["blocks.1.norm.num_batches_tracked"] == 4 * accumulation
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-4, atol=1e-5, msg=name)


class Assigns(nn.Module):
    """Counts by putting a new tensor in the buffer's place, and reads what it counted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("table", torch.ones(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.linear(x) * self.table / self.seen


@pytest.mark.parametrize("mode", ["off", pytest.param("segments", marks=slow)])
def test_a_buffer_that_is_replaced_is_written_and_read_as_in_the_first_forward(mode):
    def trained(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        step = make(Stack([Assigns(), Assigns()]), mode=mode, recompute=recompute)
        for i in range(3):
            step(data(i, 2))
        return tensors(step)

    kept, again = trained(False), trained(True)
    assert kept["blocks.1.seen"] == 6 and "blocks.0.table" not in kept
    for name, t in kept.items():
        torch.testing.assert_close(again[name], t, rtol=1e-4, atol=1e-6, msg=name)


def test_state_without_a_full_name_is_an_error():
    norm = nn.BatchNorm1d(6, affine=False)
    with pytest.raises(UsageError, match=r"block: buffer 'running_mean' is state, and has no full name"):
        make(Stack([norm]))


# Random draws.


@pytest.mark.parametrize("mode", ["off", pytest.param("segments", marks=slow)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_stored_and_recomputed_draw_the_same(mode, accumulation):
    ends = []
    for recompute in (False, True):
        step = make(stack(), sgd(0.0), mode=mode, recompute=recompute)
        before = tensors(step)
        for i in range(2):
            step(data(i, accumulation), {"all": {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.0)}})
        ends.append(tensors(step))
    for name, t in ends[0].items():
        torch.testing.assert_close(ends[1][name], t, rtol=1e-4, atol=1e-6, msg=name)
        assert not t.equal(before[name])


@pytest.mark.parametrize(
    ("mode", "recompute"), [("off", False), ("off", True), pytest.param("segments", False, marks=slow)]
)
def test_a_run_with_dropout_resumes_bitwise(mode, recompute):
    def go(step: Step, steps: range) -> None:
        for i in steps:
            torch.rand(i)  # whatever else draws in this process
            step(data(i, 2), step=i)

    straight = make(stack(), mode=mode, recompute=recompute, key=Key(5))
    go(straight, range(6))
    half = make(stack(), mode=mode, recompute=recompute, key=Key(5))
    go(half, range(3))
    torch.manual_seed(77)
    resumed = make(stack(), mode=mode, recompute=recompute, key=Key(5))
    for name, t in tensors(half).items():
        {**resumed.params, **resumed.buffers}[name].data.copy_(t)
    resumed.state.update({n: {s: t.clone() for s, t in slots.items()} for n, slots in half.state.items()})
    go(resumed, range(3, 6))
    assert equal(tensors(straight), tensors(resumed))


def test_every_step_micro_batch_and_segment_draws_its_own_and_nobody_elses_draws_change():
    seen: list[Tensor] = []

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.rand(3))
            return self.linear(x)

    def drawn(key: int) -> list[Tensor]:
        seen.clear()
        step = make(Stack([Draws(), Draws()]), key=Key(key))
        for i in range(2):
            step(data(i, 2))
        return list(seen)

    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    one, again, other = drawn(1), drawn(1), drawn(2)
    torch.manual_seed(1)
    make(stack())(data(0))
    stacked = make(stack())
    torch.manual_seed(1)
    stacked(data(0))
    stacked.chain.loss(stacked.tensors(), data(0)[0])
    assert torch.rand(4).equal(expected), "the caller's generator is as it was"
    assert len({tuple(t.tolist()) for t in one}) == 8, "2 steps, 2 micro-batches, 2 segments"
    assert all(a.equal(b) for a, b in zip(one, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(one, other, strict=True))
