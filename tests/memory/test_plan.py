"""Predicted memory against memory counted while training, for every optimizer."""

import gc
import resource
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.classifier import classifier, loss
from helpers.grids import few
from helpers.plans import METHODS, TINY, built, precise, predicted, settings
from torch._subclasses import FakeTensorMode

from engine.config import RunConfig
from engine.memory import counted_peak
from engine.planner.graphs import fused
from engine.planner.plan import Built, plan
from engine.planner.storages import Tally
from engine.step.segments import cut
from engine.step.step import Step
from engine.tasks.config import LanguageConfig
from models.llama import LlamaConfig
from optimizers.contract import Group, state_bytes, total_bytes
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

slow = pytest.mark.slow
SIZES = {  # model, sequences, tokens in each: the first is mostly weights, the second mostly activations
    "weights": (LlamaConfig(1024, 256, 688, 4, 4), 2, 64),
    "activations": (LlamaConfig(257, 96, 256, 3, 4, max_position_embeddings=256), 8, 256),
}
EXACT = (  # others are slow
    *(("snsm", False), ("sumo, when it sees too little", True), ("omgd", True), ("rso", False)),
    *(("adamw in int8", True), ("sumo in int8", False)),
)


def measured(method: str, shape: LlamaConfig, config: LanguageConfig, at: int) -> int:
    """Weights, tables, state and batches, and the counted peak of a step above them, once earlier ones compiled it."""
    gc.collect()
    segments, params, optimizer, *_ = built(method, shape, precise(config))
    state = optimizer.init(params)
    step = Step(
        segments,
        params,
        optimizer,
        state,
        mode=config.compile,
        recompute=config.recompute,
        clip=config.clip,
        compute_dtype=torch.bfloat16 if config.precision == "mixed" else None,
        stochastic_rounding=config.precision == "bf16-sr",
    )
    ids = [
        torch.randint(0, shape.vocab_size, (2, config.micro_batch, config.sequence)) for _ in range(config.accumulation)
    ]
    batches = [{"input_ids": a.clone(), "targets": b.clone()} for a, b in ids]
    hypers = {g.name: {k: torch.tensor(1e-3) for k in ("lr", "weight_decay")} for g in optimizer.owner.values()}
    for i in (0, 1):
        step(batches, hypers, i)
    tables = {id(b): b for s in segments for b in s.module.buffers()}.values()
    fixed = [*params.values(), *tables, *(t for batch in batches for t in batch.values())]
    return (
        sum(t.numel() * t.element_size() for t in fixed)
        + sum(map(state_bytes, state.values()))
        + counted_peak(lambda: step(batches, hypers, at))
    )


# Predicted against counted.


@pytest.mark.run
@pytest.mark.parametrize(
    ("method", "recompute"),
    [case if case in EXACT else pytest.param(*case, marks=slow) for case in product(METHODS, [False, True])],
)
def test_uncompiled_the_prediction_is_all_but_exact_and_the_state_is_exact(method, recompute):
    config = settings(4, 32, compile="off", recompute=recompute)
    found = predicted(method, TINY, config, 1)
    assert found.bytes == pytest.approx(measured(method, TINY, config, 1), rel=0.02)
    made = built(method, TINY)
    state = made.optimizer.init(made.params)
    assert found.state == sum(t.numel() * t.element_size() for slots in state.values() for t in slots.values())


@pytest.mark.run
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(clip="global"), marks=slow),
        dict(accumulation=6),
        pytest.param(dict(accumulation=6, recompute=True), marks=slow),
        dict(precision="mixed"),
        pytest.param(dict(precision="bf16-sr"), marks=slow),
    ],
    ids=str,
)
def test_what_costs_memory_is_seen(options):
    """More micro-batches than are simulated are extrapolated."""
    config = settings(2, 32, compile="off", **options)
    got, expected = predicted("adamw", TINY, config, 1).bytes, measured("adamw", TINY, config, 1)
    assert got == pytest.approx(expected, rel=0.02)


@pytest.mark.compiles
@slow  # of a module that compiles in seconds it is fast: below
@pytest.mark.parametrize(
    ("method", "recompute", "shape"),
    [
        (method, recompute, shape)
        for method in METHODS
        for recompute in (False, True)
        for shape in SIZES
        if shape == "weights" or method in ("adamw", "omgd", "rso")  # a rule changes no activation
    ],
)
def test_compiled_the_prediction_is_within_five_percent(method, recompute, shape):
    model, batch, tokens = SIZES[shape]
    config = settings(batch, tokens, recompute=recompute)
    got = predicted(method, model, config, 1).bytes
    torch._dynamo.reset()
    assert got == pytest.approx(measured(method, model, config, 1), rel=0.05)


@pytest.mark.compiles
@slow
@pytest.mark.parametrize(
    "options",
    [
        dict(clip="global"),
        dict(accumulation=5, recompute=True),
        dict(precision="mixed"),
        dict(precision="bf16"),
        dict(precision="bf16-sr", recompute=True),
    ],
    ids=str,
)
def test_compiled_with_other_settings_too(options):
    model, batch, tokens = SIZES["weights"]
    config = settings(batch, tokens, **options)
    got = predicted("adamw", model, config, 1).bytes
    torch._dynamo.reset()
    assert got == pytest.approx(measured("adamw", model, config, 1), rel=0.05)


@pytest.mark.parametrize("mode", ["off", pytest.param("segments", marks=pytest.mark.compiles)])
def test_a_task_of_any_module_is_planned_with_batches_of_its_own(mode):
    """The planner knows no field of a batch: a classifier's examples are counted as a language model's tokens are."""

    def made() -> Built:
        model = classifier(plain=True)
        params = dict(model.named_parameters())
        optimizer = partition(params, [Group("adamw", adamw(), ("",), lr=1e-3)])
        blank = lambda rows: {"x": torch.zeros(rows, 30), "y": torch.zeros(rows, dtype=torch.int64)}  # noqa: E731
        return Built(cut(model, loss), params, optimizer, blank)

    config = RunConfig(micro_batch=64, compile=mode)
    planned = plan(made, config, steps=(1,)).bytes
    torch._dynamo.reset()
    real = made()
    step = Step(real.segments, real.params, real.optimizer, real.optimizer.init(real.params), mode=mode)
    hypers = {"adamw": {name: torch.tensor(1e-3) for name in ("lr", "weight_decay")}}
    batch = real.batch(64)
    for i in (0, 1):
        step([batch], hypers, i)
    peak = counted_peak(lambda: step([batch], hypers, 2))
    held = sum(t.nbytes for t in (*real.params.values(), *batch.values())) + total_bytes(step.state)
    assert planned == pytest.approx(held + peak, rel=0.02 if mode == "off" else 0.05)


@pytest.mark.run
def test_a_turn_is_part_of_the_plan():
    found = predicted("rso", TINY, settings(1, 8, compile="off"))
    assert found.moments["switch"] > found.weights + found.state, "the new P, while the old one is there"


@pytest.mark.run
def test_parts_add_up_and_blocks_share_nothing_but_their_graphs():
    config = settings(4, 32, recompute=True)
    found = predicted("adamw", TINY, config)
    assert sum(found.kinds.values()) == found.bytes == max(found.moments.values()) == found.moments[found.moment]
    deeper = predicted("adamw", LlamaConfig(97, 32, 48, 4, 4, 2, max_position_embeddings=32), config)
    block = (deeper.weights + deeper.state - found.weights - found.state) / 2
    residual = 4 * 32 * 32 * 4
    assert (deeper.bytes - found.bytes) / 2 == pytest.approx(block + residual, rel=1e-3), "one residual stream a block"


@pytest.mark.run
@pytest.mark.parametrize("method", few(METHODS, "omgd", "rso"))
def test_what_a_run_does_beside_its_steps_is_part_of_the_plan(method):
    found = predicted(method, TINY, settings(4, 32, compile="off"))
    held = found.weights + found.state
    for moment in ("start-up", "resume", "evaluation", "saving"):
        assert found.moments[moment] >= held * 0.99, moment
        assert found.moments[moment] <= found.bytes
    assert found.moments["resume"] <= 1.05 * held
    gc.collect()
    segments, params, optimizer, *_ = built(method, TINY)
    step = Step(segments, params, optimizer, optimizer.init(params), mode="off")
    batch = {k: torch.zeros(4, 32, dtype=torch.int64) for k in ("input_ids", "targets")}
    tables = {id(b): b for s in segments for b in s.module.buffers()}.values()
    fixed = sum(t.nbytes for t in (*params.values(), *tables, *batch.values()))
    fixed += sum(map(state_bytes, step.state.values()))
    step.chain.loss(step.tensors(), batch)
    gc.collect()
    counted = fixed + counted_peak(lambda: step.chain.loss(step.tensors(), batch))
    if not method.startswith("omgd"):  # whose planned state is that of a later mask
        assert found.moments["evaluation"] == pytest.approx(counted, rel=0.03)


@pytest.mark.run
def test_a_copy_that_is_written_in_the_background_is_memory_of_the_cpu():
    one, two = (predicted("adamw", TINY, settings(1, 8, compile="off", save_async=mode)) for mode in ("off", "on"))
    assert two.moments["saving"] >= 2 * (one.weights + one.state) * 0.9
    assert two.moment == "saving" and one.moments["saving"] < two.moments["saving"]
    assert sum(two.kinds.values()) == two.bytes and two.kinds["copy for the disk"] > 0


@pytest.mark.run
def test_on_cuda_storages_are_rounded_and_the_context_is_counted():
    config = settings(1, 8, compile="off")
    made = lambda: built("adamw", TINY, sequence=config.sequence)  # noqa: E731
    cpu, cuda = (plan(made, config, device) for device in ("cpu", "cuda"))
    assert cuda.kinds["CUDA context (assumed)"] > 2**28
    assert cuda.weights % 512 == 0
    assert cuda.bytes - cuda.kinds["CUDA context (assumed)"] > cpu.bytes


@pytest.mark.run
def test_billions_of_parameters_are_planned_without_them():
    """As wide as 30B has it, with two of its layers, as each takes a second to plan."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wide = LlamaConfig(32000, 6656, 17920, 2, 52)
    found = predicted("adamw", wide, settings(1, 2048, recompute=True, precision="bf16"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.weights > 2.5 * 2**30
    assert grown < 2**30


@pytest.mark.compiles
def test_dropout_can_be_planned() -> None:
    """What it keeps for backward is one mask of bytes at most: its numbers are drawn where they are used."""
    tally = Tally(lambda n: n)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(64, 64, requires_grad=True)
        with tally, tally.doing("forward", "activations"):
            out = fused(lambda x: F.dropout(x.relu(), 0.5), tally)(x)
        assert out.shape == x.shape and out.requires_grad
    assert 64 * 64 * 4 <= tally.peaks()["forward"].bytes <= 64 * 64 * (4 + 1 + 1) + 64
