"""One training step equals plain PyTorch in every mode: accumulation, recompute, clipping, frozen parameters."""

import functools
from collections.abc import Iterable
from itertools import product

import pytest
import torch
from helpers.models import LR, batches, distance, llama, rate
from helpers.steps import DECAY, EPS, STEPS, Run, hypers, make, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, get_total_norm

from engine.step.segments import cut
from engine.step.step import Step
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd

CLIP = 0.3
slow = pytest.mark.slow


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int = 1, clip: str = "none") -> Run:
    """The same training as one writes it by hand."""
    losses, norms, previous = [], [], 0.0
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i in range(STEPS):
        data = batches(i, accumulation)
        valid = sum((batch["targets"] != -100).sum() for batch in data)
        optimizer.zero_grad()
        for batch in data:
            logits = model(batch["input_ids"]).flatten(0, 1)
            loss = cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100, reduction="sum") / valid
            loss.backward()
            losses.append(loss.item())
        losses[-accumulation:] = [sum(losses[-accumulation:])]
        norms.append(get_total_norm([p.grad for p in params.values()]).item())
        if clip == "global":
            clip_grad_norm_(params.values(), CLIP)
        elif clip == "tensor":
            for p in params.values():
                clip_grad_norm_([p], CLIP)
        elif clip == "previous" and previous:
            for p in params.values():
                p.grad *= min(1.0, CLIP / (previous + 1e-6))
        previous = norms[-1]
        for group in optimizer.param_groups:
            group["lr"] = rate(i)
        optimizer.step()
    return Run({name: p.detach() for name, p in model.named_parameters()}, losses, norms)


def torch_adamw(params: Iterable[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, eps=EPS, weight_decay=DECAY)


@functools.cache
def plain_adamw(layers: int, tied: bool, accumulation: int) -> Run:
    model = llama(layers, tied)
    return plain(model, torch_adamw(model.parameters()), accumulation)


def same(got: Run, expected: Run, tolerance: float = 1e-5) -> None:
    assert got.losses == pytest.approx(expected.losses, rel=tolerance)
    assert got.norms == pytest.approx(expected.norms, rel=tolerance)
    assert distance(got.params, expected.params) < tolerance


# The same numbers as plain PyTorch.


@pytest.mark.parametrize(
    ("layers", "recompute", "accumulation", "tied"),
    [
        *((2, *case) for case in ((False, 1, True), (False, 4, False), (True, 4, True))),
        *(pytest.param(2, *case, marks=slow) for case in ((False, 1, False), (False, 4, True), (True, 1, False))),
        *(pytest.param(2, *case, marks=slow) for case in ((True, 1, True), (True, 4, False))),
        *(pytest.param(1, *case, marks=slow) for case in product((False, True), (1, 4), (False, True))),
    ],
)
def test_ten_steps_uncompiled_equal_plain_pytorch(layers, recompute, accumulation, tied):
    got = run(make(llama(layers, tied), recompute=recompute), accumulation)
    same(got, plain_adamw(layers, tied, accumulation))


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("mode", "layers", "recompute", "accumulation", "tied"),
    [
        ("segments", 2, True, 4, True),
        *(
            pytest.param("segments", 2, recompute, accumulation, tied, marks=slow)
            for recompute in (False, True)
            for accumulation in (1, 4)
            for tied in (False, True)
            if not (recompute and accumulation == 4 and tied)
        ),
    ],
)
def test_ten_steps_compiled_equal_plain_pytorch(mode, layers, recompute, accumulation, tied, backend):
    got = run(make(llama(layers, tied), mode=mode, recompute=recompute), accumulation)
    same(got, plain_adamw(layers, tied, accumulation))


@pytest.mark.parametrize(
    ("mode", "recompute", "accumulation", "clip"),
    [
        ("off", False, 1, "tensor"),
        ("off", True, 3, "global"),
        ("off", True, 3, "previous"),
        pytest.param("off", True, 3, "tensor", marks=slow),
        *(pytest.param("off", False, 1, clip, marks=slow) for clip in ("global", "previous")),
        *(pytest.param("segments", False, 1, clip, marks=slow) for clip in ("tensor", "global", "previous")),
    ],
)
def test_clipping_equals_plain_formulas(mode, recompute, accumulation, clip):
    """Under SGD, which unlike Adam feels every factor. The reported norm is that before clipping."""
    step = make(llama(1), sgd(momentum=0.9), mode=mode, recompute=recompute, clip=clip, clip_norm=CLIP)
    got = run(step, accumulation, decay=0.0)
    model = llama(1)
    expected = plain(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), accumulation, clip)
    assert min(expected.norms) > 2 * CLIP, "nothing was clipped"
    same(got, expected)


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_no_clipping_rule_does_anything_below_its_bound(clip_norm):
    ends = {}
    for clip in ("none", "tensor", "global", "previous"):
        step = make(llama(1), sgd(momentum=0.9), clip=clip, clip_norm=clip_norm)
        ends[clip] = run(step).params
    for clip in ("tensor", "global", "previous"):
        moved = distance(ends[clip], ends["none"])
        assert (moved == 0) == (clip_norm == 1e6), (clip, moved)


# Any module, as a chain of one.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def classify(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return cross_entropy(module(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])


@pytest.mark.parametrize(
    ("mode", "recompute", "accumulation"),
    [
        *product(("off",), (False, True), (1, 2)),
        pytest.param("segments", False, 1, marks=[pytest.mark.compiles, slow]),
        pytest.param("segments", False, 2, marks=pytest.mark.compiles),
    ],
)
def test_a_foreign_module_trains_as_in_plain_pytorch_and_its_buffers_move(mode, recompute, accumulation):
    model, reference = network(), network()
    step = make(model, loss=classify, mode=mode, recompute=recompute)
    optimizer = torch_adamw(reference.parameters())
    generator = torch.Generator().manual_seed(1)
    for i in range(STEPS):
        x = torch.randn(accumulation, 16, 6, generator=generator)
        data = [{"x": xs, "y": (xs[:, 0] > 0).long()} for xs in x]
        optimizer.zero_grad()
        losses = [cross_entropy(reference(batch["x"]), batch["y"]) / accumulation for batch in data]
        for loss in losses:
            loss.backward()
        norm = get_total_norm([p.grad for p in reference.parameters()])
        optimizer.step()
        result = step(data, hypers(i, LR), i)
        assert result.loss.item() == pytest.approx(sum(losses).item(), rel=1e-5)
        assert result.norm.item() == pytest.approx(norm.item(), rel=1e-5)
    buffers = dict(model.named_buffers())
    assert buffers["1.num_batches_tracked"] == STEPS * accumulation
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    assert distance(dict(model.named_parameters()), dict(reference.named_parameters())) < 1e-4


def test_a_module_without_segments_needs_a_loss():
    with pytest.raises(UsageError, match=r"Sequential has no segments\(\); pass loss="):
        cut(network())


def test_segments_and_parameters_must_name_the_same_tensors():
    model = llama(1)
    params = dict(model.named_parameters())
    optimizer = partition(params, [Group("all", adamw(), ("",), LR)])
    missing = {name: p for name, p in params.items() if name != "model.norm.weight"} | {"extra": torch.ones(2)}
    with pytest.raises(UsageError, match=r"only the segments \['model.norm.weight'\].*only the parameters \['extra'\]"):
        Step(cut(model), missing, optimizer, optimizer.init(params))


# Frozen parameters.


FROZEN = {
    "embedding and first block": ("model.embed_tokens", "model.layers.0."),
    "last block and head": ("model.layers.1.", "model.norm", "lm_head"),
    "matrices here and there": ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"),
    "all but the norms": ("proj", "embed", "lm_head"),
}


@pytest.mark.run
@pytest.mark.parametrize(
    ("mode", "which"),
    [
        ("off", "embedding and first block"),
        ("recompute", "matrices here and there"),
        ("off", "all but the norms"),
        ("recompute", "last block and head"),
        *(pytest.param("recompute", which, marks=slow) for which in ("embedding and first block", "all but the norms")),
        *(pytest.param("off", which, marks=slow) for which in ("matrices here and there", "last block and head")),
        pytest.param("segments", "matrices here and there", marks=slow),
        pytest.param("segments", "last block and head", marks=slow),
    ],
)
def test_frozen_parameters_are_untouched_and_have_no_gradient(mode, which):
    model, reference = llama(), llama()
    frozen = tuple(n for n, _ in model.named_parameters() if any(part in n for part in FROZEN[which]))
    for name, p in reference.named_parameters():
        p.requires_grad_(name not in frozen)
    moving = [p for p in reference.parameters() if p.requires_grad]
    assert 0 < len(moving) < len(moving) + len(frozen)
    recompute = mode == "recompute"
    step = make(model, frozen=frozen, mode="off" if recompute else mode, recompute=recompute)
    start = {name: p.detach().clone() for name, p in step.params.items()}
    expected = plain(reference, torch_adamw(moving), 2)
    got = run(step, 2)
    same(got, expected)
    for name in frozen:
        assert step.params[name].equal(start[name]), name
        assert all(not slot.any() for slot in step.state[name].values()), f"state of {name} moved"
    last = step(batches(0), hypers(0), STEPS)
    assert sorted(n for names, _ in last.squares for n in names) == sorted(set(step.params) - set(frozen))
    assert all(p.grad is None for p in step.params.values())
