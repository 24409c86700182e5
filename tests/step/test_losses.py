"""Losses that are sums with counts; fields of a token; rates; who watches a step."""

import pytest
import torch
from helpers.modules import LR, Batch, data, equal, llama, make, stack, tensors, whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine.step.observer import Observer
from engine.step.segments import cut
from engine.step.step import Step
from engine.step.tokens import slices
from models.segment import IGNORED
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.rules.galore import galore
from optimizers.rules.sgd import sgd

# Losses and their counts.


@pytest.mark.parametrize("clip", ["none", "global", "tensor"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chain", [False, True], ids=["one", "segments"])
def test_a_sum_with_its_count_is_divided_by_the_count_of_the_step(chain, recompute, clip):
    """The first of three micro-batches has no target, the others have two and four."""
    model, reference = stack(0.0), stack(0.0)
    step = make(model, sgd(0.0), loss=None if chain else whole, recompute=recompute, clip=clip, clip_norm=0.1)
    batches = data(0, 3, ignored=True)
    total = sum(whole(reference, b)[0] for b in batches) / 6
    grads = dict(
        zip(dict(reference.named_parameters()), torch.autograd.grad(total, reference.parameters()), strict=True)
    )
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    before = tensors(step)
    result = step(batches, {"all": {"lr": torch.tensor(1.0), "weight_decay": torch.tensor(0.0)}})
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert result.norm.item() == pytest.approx(norm.item(), rel=1e-4)
    for name, g in grads.items():
        factor = 1 if clip == "none" else min(1, 0.1 / (norm if clip == "global" else g.norm()).item())
        torch.testing.assert_close(before[name] - step.params[name].detach(), g * factor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_without_any_target_learns_nothing(accumulation):
    step = make(stack(0.0), sgd(0.0))
    batches = data(0, accumulation)
    for batch in batches:
        batch["y"].fill_(IGNORED)
    before = tensors(step)
    result = step(batches, {"all": {"weight_decay": torch.tensor(0.0)}})
    assert result.loss == 0 and result.norm == 0
    assert all(step.params[n].equal(before[n]) for n in step.params)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mean_over_several_micro_batches_is_refused_with_the_way_out(recompute):
    def mean(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch["x"]), batch["y"])

    step = make(stack(0.0), loss=mean, recompute=recompute)
    before = tensors(step)
    with pytest.raises(UsageError, match=r"return \(sum, count\) from the loss"):
        step(data(0, 2))
    assert all(step.params[n].equal(before[n]) for n in step.params)
    assert step(data(0)).loss.item() == pytest.approx(mean(stack(0.0), data(0)[0]).item(), rel=1e-6)


class Both(nn.Module):
    """Of a + b both gradients are one tensor, that of c is a number repeated, and d is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(5)) for _ in "abcd")


def both(model: Both, batch: Batch) -> tuple[Tensor, Tensor]:
    return ((model.a + model.b) * batch["x"]).square().sum() + model.c.sum(), batch["count"]


def test_gradients_that_share_memory_and_parameters_without_any():
    model, reference = Both(), Both()
    step = make(model, sgd(0.0), loss=both)
    batches = [{"x": torch.randn(5), "count": torch.tensor(float(n))} for n in (1, 0.5, 2)]
    sum(both(reference, batch)[0] for batch in batches).backward()
    step(batches, {"all": {"lr": torch.tensor(1.0)}})
    for name in "abc":
        start = reference.get_parameter(name)
        expected = start - start.grad / 3.5 - 0.1 * start
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-5)
    assert model.d.equal(reference.d), "no gradient, no decay, as in plain PyTorch"


def weighted(module: nn.Module, x: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
    losses = cross_entropy(module(x).flatten(0, -2), batch["targets"].flatten(), reduction="none")
    return (losses * batch["weights"].flatten()).sum() * batch["factor"], batch["weights"].sum()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_field_of_a_token_reaches_the_slices_of_the_head(recompute, accumulation):
    model = llama()
    chain = cut(model)
    step = make(model, sgd(0.0), logits=97 * 4)
    head = chain[-1]._replace(call=weighted)
    params = dict(model.named_parameters())
    step = Step([*chain[:-1], head], params, step.optimizer, step.state, mode="off", recompute=recompute, logits=97 * 4)
    assert len(slices(16, step.chain.most_tokens)) == 4
    batches = []
    for j in range(accumulation):
        generator = torch.Generator().manual_seed(j)
        tokens = torch.randint(0, 97, (2, 9), generator=generator)
        fields = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        batches.append(fields | {"weights": torch.rand(2, 8, generator=generator), "factor": torch.tensor(0.5)})
    losses = [
        cross_entropy(model(b["input_ids"]).flatten(0, 1), b["targets"].flatten(), reduction="none") for b in batches
    ]
    pairs = zip(losses, batches, strict=True)
    total = sum((own * b["weights"].flatten()).sum() / 2 for own, b in pairs) / sum(b["weights"].sum() for b in batches)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(total, model.parameters())]).norm()
    summed, count = step.chain.loss(step.tensors(), batches[0])
    result = step(batches)
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert result.norm.item() == pytest.approx(norm.item(), rel=1e-4)
    if accumulation == 1:
        assert (summed / count).item() == pytest.approx(total.item(), rel=1e-5)


# Rates, and who watches.


def test_rates_and_decay_are_the_groups_own_unless_given():
    moved = {}
    for name, given in {
        "own": None,
        "same": {"all": {"lr": torch.tensor(LR), "weight_decay": torch.tensor(0.1)}},
        "part": {"all": {"lr": torch.tensor(LR)}},
        "other": {"all": {"lr": torch.tensor(0.0)}},
    }.items():
        step = make(stack(0.0), sgd(0.0))
        before = tensors(step)
        step(data(0), given)
        moved[name] = {n: p.detach() - before[n] for n, p in step.params.items()}
    assert equal(moved["own"], moved["same"]) and equal(moved["own"], moved["part"])
    assert any(t.any() for t in moved["own"].values()) and not any(t.any() for t in moved["other"].values())
    with pytest.raises(UsageError, match=r"got a group 'al', expected some of \['all'\]"):
        step(data(0), {"al": {"lr": torch.tensor(0.0)}})


@pytest.mark.parametrize("recompute", [False, True])
def test_an_observer_is_told_what_a_step_does(recompute):
    class Watching(Observer):
        def __init__(self) -> None:
            self.moments: list[str] = []
            self.kinds: set[str] = set()

        def doing(self, moment: str, part: str):
            self.moments.append(moment)
            return super().doing(moment, part)

        def made(self, kind: str, tensors) -> None:
            self.kinds.add(kind)

    watching = Watching()
    model = stack()
    params = dict(model.named_parameters())
    groups = [Group("low rank", galore(2, 2), (r"linear\.weight$",), LR), Group("rest", sgd(0.0), ("",), LR)]
    optimizer = partition(params, groups)
    options = dict(mode="off", recompute=recompute, observer=watching)
    Step(cut(model), params, optimizer, optimizer.init(params), **options)(data(0))
    forward = ["forward of stem", "forward of block 0", "forward of block 1", "head", "forward of head"]
    blocks = [f"backward of block {i}" for i in (1, 0)]
    times = 1 + recompute
    expected = [*forward, "backward of head", *[name for name in (*blocks, "backward of stem") for _ in range(times)]]
    assert [m for m in watching.moments if m not in ("update", "refresh")] == expected
    assert watching.moments.count("update") == 4 and watching.moments.count("refresh") > 0
    assert watching.kinds == {"residual stream", "gradients"}
