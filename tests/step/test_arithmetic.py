"""How a run computes: precision of fp32 products, determinism, sums of gradients, attention of grouped heads."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.matrices import randn
from helpers.models import batches, llama
from helpers.steps import make
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import arithmetic as module
from engine.arithmetic import WORKSPACE, arithmetic
from engine.config import RunConfig
from engine.fit import fit
from engine.step import backward
from engine.step.gradients import accumulate
from engine.step.step import Step
from engine.tasks.arrays import ArrayTask
from models import packed
from models.packed import for_kernel
from optimizers.contract import Group, Params, UsageError
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.sgd import sgd
from recipes import train as trained
from recipes.registry import parsed


class Stopped(Exception):
    pass


def test_settings_hold_inside_and_are_put_back(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    with arithmetic(RunConfig(matmul="medium", deterministic=True)):
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.are_deterministic_algorithms_enabled() and torch._inductor.config.deterministic
        assert os.environ[WORKSPACE] == ":4096:8"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled() and not torch._inductor.config.deterministic


def test_cuda_that_runs_already_without_its_workspace_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(WORKSPACE, ":0:0")
    said = "--deterministic: got CUBLAS_WORKSPACE_CONFIG=':0:0' .* expected one of"
    with pytest.raises(UsageError, match=said), arithmetic(RunConfig(deterministic=True)):
        pass
    monkeypatch.setenv(WORKSPACE, module.FIXED[1])
    with arithmetic(RunConfig(deterministic=True)):
        assert os.environ[WORKSPACE] == module.FIXED[1]


def test_recipes_and_fit_train_by_them(tmp_path: Path, monkeypatch):
    def stop(*_: object) -> None:
        raise Stopped(torch.get_float32_matmul_precision())

    monkeypatch.setattr(trained, "material_of", stop)
    words = ["baseline", "--matmul", "high", "--device", "cpu", "--compile", "off", "--out", str(tmp_path / "a")]
    with pytest.raises(Stopped, match="high"):
        trained.train(parsed(words, "test"))

    model = nn.Linear(2, 1)
    task = ArrayTask(model, lambda *_: stop(), train={"x": torch.ones(4, 2)}, validation={"x": torch.ones(4, 2)})
    optimizer = partition(dict(model.named_parameters()), [Group("all", sgd(0.0), ("",), 0.1)])
    with pytest.raises(Stopped, match="medium"):
        fit(task, optimizer, RunConfig(out=tmp_path / "b", matmul="medium", compile="off", device="cpu"))


def test_many_small_gradients_are_not_lost():
    """In bfloat16 1 + 2^-9 is 1: a sum in it would stay there."""
    held: Params = {}
    for i in range(513):
        accumulate(held, {"w": torch.full((3,), 1.0 if i == 0 else 2.0**-9, dtype=torch.bfloat16)}, False)
    assert held["w"].dtype == torch.float32 and held["w"].equal(torch.full((3,), 2.0))


def summed(step: Step, order: Callable[..., Tensor], given: list[dict[str, Tensor]]) -> Params:
    """The gradients that would move the parameters."""
    params = {name: p.detach().requires_grad_() for name, p in step.params.items()}
    found: Params = {}
    with step.chain.draws.of(Key(0)):
        order(step.chain, params, given, step._scale(given), found.update)
    return found


@pytest.mark.parametrize("order", [backward.stored, backward.recomputed])
def test_gradients_of_micro_batches_and_slices_add_up_in_float32(order):
    """What has one contribution stays in the dtype of the weights, and costs no more memory."""
    step = make(llama(2, tied=True).to(torch.bfloat16))
    given = [batches(i)[0] for i in range(3)]
    assert {g.dtype for g in summed(step, order, given).values()} == {torch.float32}
    several = {n for n, g in summed(step, order, given[:1]).items() if g.dtype == torch.float32}
    assert several == {"model.embed_tokens.weight", "model.norm.weight"}, "slices of the head, and what is tied to it"
    step = make(llama(2).to(torch.bfloat16), logits=2**24)
    assert {g.dtype for g in summed(step, order, given[:1]).values()} == {torch.bfloat16}


def test_grouped_heads_in_float32_are_spread_on_cuda_only(monkeypatch):
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 5, 8, seed=1), randn(2, 2, 5, 8, seed=2)
    assert for_kernel(q, k, v, True)[2] is True, "the CPU's kernel groups them"
    with FakeTensorMode():
        a, b = (torch.empty(2, n, 5, 8, device="cuda") for n in (4, 2))
        spread, _, grouped = for_kernel(a, b, b, True)
        assert spread.shape == a.shape and not grouped
        assert for_kernel(a.bfloat16(), b.bfloat16(), b.bfloat16(), True)[0].shape == b.shape
    there = packed.F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    torch.testing.assert_close(packed.F.scaled_dot_product_attention(q, *wide, is_causal=True), there)
