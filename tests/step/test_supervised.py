"""Targets that are IGNORED: they weigh nothing over micro-batches, and where the batch says so never reach the head."""

import numpy as np
import pytest
import torch
from helpers.grids import covering, few
from helpers.models import VOCABULARY, distance, graphs, llama
from helpers.steps import hypers, make
from torch import Tensor
from torch._dynamo.utils import counters

from engine.data import IGNORED
from engine.data.chat.packing import supervised
from engine.step.segments import Chain, cut
from engine.step.step import Step

Batch = dict[str, Tensor]


def masked(step: int, rows: int = 4) -> Batch:
    """Rows of 16 tokens, with very different numbers of targets that count."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (rows, 17), generator=draw)
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, torch.randperm(16, generator=draw)[: (15, 13, 9, 0)[row % 4]]] = IGNORED
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": targets}


def told(batch: Batch) -> Batch:
    return {**batch, "supervised": torch.from_numpy(supervised(batch["targets"].numpy()))}


def parts(batch: Batch, rows: int) -> list[Batch]:
    count = len(batch["targets"])
    return [{name: t[i : i + rows] for name, t in batch.items()} for i in range(0, count, rows)]


@pytest.mark.parametrize(("recompute", "tell"), covering([False, True], [False, True]))
def test_accumulation_over_unequal_masks_is_one_batch(recompute: bool, tell: bool) -> None:
    found = []
    for rows in (4, 1):
        step = make(llama(), recompute=recompute)
        losses = []
        for i in range(3):
            micro = parts(masked(i), rows)
            losses.append(step([told(b) for b in micro] if tell else micro, hypers(i), i).loss.item())
        found.append((step.params, losses))
    assert distance(found[0][0], found[1][0]) < 1e-6
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize(
    ("recompute", "accumulation", "logits"),
    [
        (False, 1, VOCABULARY * 3),
        (True, 2, 2**24),
        (False, 2, VOCABULARY * 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((True, 1, 2**24), (False, 1, 2**24), (False, 2, 2**24))
        ),
        *(pytest.param(True, count, VOCABULARY * 3, marks=pytest.mark.slow) for count in (1, 2)),
    ],
)
def test_what_is_left_out_of_the_head_changes_nothing(recompute: bool, accumulation: int, logits: int) -> None:
    found = []
    for tell in (False, True):
        step = make(llama(tied=True), recompute=recompute, logits=logits)
        for i in range(3):
            micro = parts(masked(i), 4 // accumulation)
            result = step([told(b) for b in micro] if tell else micro, hypers(i), i)
        found.append((step.params, result.loss.item(), result.norm.item()))
    assert distance(found[0][0], found[1][0]) < 1e-6
    np.testing.assert_allclose(found[0][1:], found[1][1:], rtol=1e-6)


def rows_of_the_head(step: Step, batch: Batch) -> int:
    """Tokens that the output matrix is multiplied with, forward, in a step."""
    counted = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.nn.functional.linear and arguments[1].shape[0] == VOCABULARY:
                counted.append(arguments[0].shape[:-1].numel())
            return function(*arguments, **(options or {}))

    with Counting():
        step([batch], hypers(0), 0)
    return sum(counted)


def test_the_output_matrix_sees_supervised_tokens_only() -> None:
    batch = masked(0)
    batch["targets"][3, 4:] = IGNORED
    assert rows_of_the_head(make(llama()), batch) == 4 * 16
    told_ = told(batch)
    assert told_["supervised"].shape == (4, 8), "the fullest row has 7; an eighth of 16 is 2"
    assert rows_of_the_head(make(llama()), told_) == 4 * 8


def test_evaluation_sees_them_only_and_finds_the_same() -> None:
    model = llama()
    chain, params = Chain(cut(model), logits=VOCABULARY * 8), dict(model.named_parameters())
    loss, count = chain.loss(params, masked(1))
    told_loss, told_count = chain.loss(params, told(masked(1)))
    torch.testing.assert_close(told_loss, loss)
    assert told_count == count == (masked(1)["targets"] != IGNORED).sum()


def test_no_segment_sees_the_field_whose_shape_changes() -> None:
    step, seen = make(llama()), set()
    for kind, forward in step.chain.forwards.items():
        step.chain.forwards[kind] = lambda p, x, batch, *more, f=forward: seen.update(batch) or f(p, x, batch, *more)
    step([told(masked(0))], hypers(0), 0)
    assert seen == {"input_ids", "targets"}


def packed(step: int) -> Batch:
    """Rows of two documents, whose border moves from step to step, told which tokens are supervised."""
    batch, places = told({name: t[step % 4].repeat(2, 1) for name, t in masked(step).items()}), torch.arange(16)
    border = 3 * step % 16
    number = (places >= border).long()
    return {**batch, "documents": number.repeat(2, 1), "positions": (places - border * number).repeat(2, 1)}


@pytest.mark.compiles
def test_any_documents_and_any_number_of_supervised_tokens_are_one_graph(traced) -> None:
    step = make(llama(2), mode="segments", logits=2**24)
    torch._dynamo.reset()
    counters.clear()
    numbers = []
    for i in range(5):
        step([packed(i)], hypers(0), i)
        numbers.append(graphs())
    assert len({packed(i)["supervised"].shape for i in range(5)}) > 2
    assert numbers[0] == numbers[-1] == 6


@pytest.mark.compiles
@pytest.mark.parametrize("recompute", few([False, True], True))
def test_packed_rows_compiled_equal_uncompiled(recompute: bool, backend: str) -> None:
    found = []
    for mode in ("off", "segments"):
        step = make(llama(), mode=mode, recompute=recompute)
        losses = [step([packed(2 * i), packed(2 * i + 1)], hypers(i), i).loss.item() for i in range(3)]
        found.append((step.params, losses))
    assert distance(found[0][0], found[1][0]) < 1e-5
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
