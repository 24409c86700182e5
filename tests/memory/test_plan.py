"""Predicted memory against memory counted while training, for every optimizer; and what the command line answers."""

import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.classifier import classifier, loss
from torch import Tensor

from engine.config import RunConfig
from engine.memory import counted_peak
from engine.planner.plan import Built, Plan, cast, plan
from engine.step.segments import cut
from engine.step.step import Step
from engine.tasks.config import LanguageConfig
from engine.tasks.language import blank
from models.layers import attach
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.contract import Group, Optimizer, Rule, state_bytes, total_bytes
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.rules.snsm import snsm
from optimizers.rules.sumo import sumo
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal
from tools.plan import changed, halves, main, positive, proposal, size

ROOT = Path(__file__).resolve().parents[2]
MATRICES = r"_proj\.weight$"
slow = pytest.mark.slow
Params = dict[str, Tensor]
SIZES = {  # model, sequences, tokens in each: the first is mostly weights, the second mostly activations
    "weights": (LlamaConfig(1024, 256, 688, 4, 4), 2, 64),
    "activations": (LlamaConfig(257, 96, 256, 3, 4, max_position_embeddings=256), 8, 256),
}
TINY = LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=32)


def plain(rule: Rule) -> Callable[[Llama, Params], Optimizer]:
    groups = [Group("rule", rule, (MATRICES,), 1e-3), Group("rest", adamw(), ("",), 1e-3)]
    return lambda model, params: partition(params, groups)


def masked(model: Llama, params: Params) -> Optimizer:
    masks = traversal(layers(params), Key(1), active=2, period=10)
    return omgd(plain(adamw())(model, params), params, masks)


def subspaces(model: Llama, params: Params) -> Optimizer:
    names = [name for name in params if name.endswith("_proj.weight")]
    made = rso(plain(adamw())(model, params), params, names, 16, period=10)
    attach(model, names, 16)
    return made


METHODS: dict[str, Callable[[Llama, Params], Optimizer]] = {
    "adamw": plain(adamw()),
    "sgd": plain(sgd(0.9)),
    "muon": plain(muon()),
    "galore": plain(galore(16)),
    "snsm": plain(snsm(16)),
    "sumo": plain(sumo(16)),
    "sumo, tracked": plain(sumo(16, 1, basis="track")),
    "sumo, when it sees too little": plain(sumo(16, refresh_below=1e9)),
    "omgd": masked,
    "rso": subspaces,
}


def built(
    method: str, shape: LlamaConfig, dtype: torch.dtype = torch.float32, fill: bool = True, sequence: int = 0
) -> Built:
    """Model and optimizer, on whatever tensors are made here: real or fake ones, which need not be filled."""
    with torch.device("meta"):
        model = Llama(shape)
    model.allocate("cpu")
    if fill:
        model.init_weights(0)
    if dtype != torch.float32:
        cast(model, dtype)
    params: Params = dict(model.named_parameters())
    optimizer = METHODS[method](model, params)
    return Built(cut(model), params, optimizer, lambda rows: blank(rows, sequence))


def settings(batch: int, tokens: int, **options) -> LanguageConfig:
    return LanguageConfig(**(dict(micro_batch=batch, sequence=tokens, steps=100) | options))


def precise(config: LanguageConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision.startswith("bf16") else torch.float32


def predicted(method: str, shape: LlamaConfig, config: LanguageConfig, *steps: int) -> Plan:
    gc.collect()  # what other tests left in cycles dies when it likes
    return plan(lambda: built(method, shape, precise(config), False, config.sequence), config, steps=steps)


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


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("method", METHODS)
def test_uncompiled_the_prediction_is_all_but_exact(method, recompute):
    config = settings(4, 32, compile="off", recompute=recompute)
    got, expected = predicted(method, TINY, config, 1).bytes, measured(method, TINY, config, 1)
    assert got == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        dict(clip="global"),
        dict(accumulation=2),
        dict(accumulation=6),
        dict(accumulation=6, recompute=True),
        dict(precision="mixed"),
        dict(precision="bf16-sr"),
    ],
    ids=str,
)
def test_what_costs_memory_is_seen(options):
    """More micro-batches than are simulated are extrapolated."""
    config = settings(2, 32, compile="off", **options)
    got, expected = predicted("adamw", TINY, config, 1).bytes, measured("adamw", TINY, config, 1)
    assert got == pytest.approx(expected, rel=0.02)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("method", "recompute", "shape"),
    [
        ("snsm", True, "weights"),
        *(
            pytest.param(method, recompute, shape, marks=slow)
            for method in METHODS
            for recompute in (False, True)
            for shape in SIZES
            if (method, recompute, shape) != ("snsm", True, "weights")
        ),
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


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_the_state_are_exact(method):
    made = built(method, TINY)
    state = made.optimizer.init(made.params)
    expected = sum(t.numel() * t.element_size() for slots in state.values() for t in slots.values())
    assert predicted(method, TINY, settings(1, 8, compile="off"), 1).state == expected


def test_a_task_of_any_module_is_planned_with_batches_of_its_own():
    """The planner knows no field of a batch: a classifier's examples are counted as a language model's tokens are."""

    def made() -> Built:
        model = classifier(plain=True)
        params = dict(model.named_parameters())
        optimizer = partition(params, [Group("adamw", adamw(), ("",), lr=1e-3)])
        blank = lambda rows: {"x": torch.zeros(rows, 30), "y": torch.zeros(rows, dtype=torch.int64)}  # noqa: E731
        return Built(cut(model, loss), params, optimizer, blank)

    config = RunConfig(micro_batch=64, compile="off")
    real = made()
    step = Step(real.segments, real.params, real.optimizer, real.optimizer.init(real.params), mode="off")
    hypers = {"adamw": {name: torch.tensor(1e-3) for name in ("lr", "weight_decay")}}
    batch = real.batch(64)
    step([batch], hypers, 0)
    peak = counted_peak(lambda: step([batch], hypers, 1))
    held = sum(t.nbytes for t in (*real.params.values(), *batch.values())) + total_bytes(step.state)
    assert plan(made, config, steps=(1,)).bytes == pytest.approx(held + peak, rel=0.02)


def test_a_turn_is_part_of_the_plan():
    found = predicted("rso", TINY, settings(1, 8, compile="off"))
    assert found.moments["switch"] > found.weights + found.state, "the new P, while the old one is there"


def test_parts_add_up_and_blocks_share_nothing_but_their_graphs():
    config = settings(4, 32, recompute=True)
    found = predicted("adamw", TINY, config)
    assert sum(found.kinds.values()) == found.bytes == max(found.moments.values()) == found.moments[found.moment]
    deeper = predicted("adamw", LlamaConfig(97, 32, 48, 4, 4, 2, max_position_embeddings=32), config)
    block = (deeper.weights + deeper.state - found.weights - found.state) / 2
    residual = 4 * 32 * 32 * 4
    assert (deeper.bytes - found.bytes) / 2 == pytest.approx(block + residual, rel=1e-3), "one residual stream a block"


@pytest.mark.parametrize("method", METHODS)
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
    if method != "omgd":  # whose planned state is that of a later mask
        assert found.moments["evaluation"] == pytest.approx(counted, rel=0.03)


def test_a_copy_that_is_written_in_the_background_is_memory_of_the_cpu():
    one, two = (predicted("adamw", TINY, settings(1, 8, compile="off", save_async=mode)) for mode in ("off", "on"))
    assert two.moments["saving"] >= 2 * (one.weights + one.state) * 0.9
    assert two.moment == "saving" and one.moments["saving"] < two.moments["saving"]
    assert sum(two.kinds.values()) == two.bytes and two.kinds["copy for the disk"] > 0


def test_on_cuda_storages_are_rounded_and_the_context_is_counted():
    config = settings(1, 8, compile="off")
    made = lambda: built("adamw", TINY, sequence=config.sequence)  # noqa: E731
    cpu, cuda = (plan(made, config, device) for device in ("cpu", "cuda"))
    assert cuda.kinds["CUDA context (assumed)"] > 2**28
    assert cuda.weights % 512 == 0
    assert cuda.bytes - cuda.kinds["CUDA context (assumed)"] > cpu.bytes


@pytest.mark.run
def test_seven_billion_parameters_are_planned_without_them():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predicted("adamw", PRESETS["7b"], settings(1, 2048, recompute=True, precision="bf16"))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert found.weights > 12 * 2**30
    assert grown < 2**30


# The command line.


def test_sizes_are_read_with_their_units():
    assert size("24GiB") == 24 * 2**30
    assert size("1.5 GB") == 1_500_000_000
    assert size("800mib") == 800 * 2**20
    for text in ("24", "GiB", "-1GiB", "0GiB", "24 apples"):
        with pytest.raises(ValueError, match="such as 24GiB"):
            size(text)
    assert positive("32000") == 32000
    with pytest.raises(ValueError, match="whole number"):
        positive("-1")
    assert list(halves(9)) == [4, 2, 1]


@pytest.mark.run
@pytest.mark.parametrize(
    "arguments",
    [
        ["snsm", "--fit"],
        ["snsm", "--fit=lots"],
        ["../x"],
        ["no_such"],
        ["omgd", "toy"],
        [],
        ["snsm", "--vocabulary", "no"],
    ],
)
def test_bad_arguments_end_with_two(arguments):
    assert main(arguments) == 2


SMALL = ["--size.hidden-size", "32", "--size.intermediate-size", "48", "--size.num-hidden-layers", "2"]
SMALL += ["--size.num-attention-heads", "4", "--sequence", "32", "--compile", "off", "--device", "cpu"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tools.plan", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.run
def test_the_command_says_what_fits_and_its_exit_code_too():
    asked = command("baseline", *SMALL, "--json")
    assert asked.returncode == 0, asked.stderr
    content = json.loads(asked.stdout)
    need, least = content["asked"]["bytes"], content["asked"]["weights"] + content["asked"]["state"]
    assert "fits" not in content
    close = command("baseline", *SMALL, "--fit", f"{(2 * least + need) // 3}B")
    assert close.returncode == 0, close.stderr
    assert "--recompute" in close.stdout.splitlines()[-1]
    assert "\x1b" not in close.stdout, "plain when piped"
    never = command("baseline", *SMALL, "--fit", f"{least}B")
    assert never.returncode == 3, never.stderr
    assert "nothing does" in never.stdout
    assert command("baseline", *SMALL, "--fit", "1GiB", "--micro-batch", "0").returncode == 2


@pytest.mark.run
def test_a_proposal_is_planned_to_fit_and_is_the_mildest():
    config = settings(8, 32, compile="off")

    def measure(config: LanguageConfig) -> Plan:
        return predicted("adamw", TINY, config, 1)

    needs = {
        (recompute, batch): measure(
            settings(batch, 32, compile="off", recompute=recompute, accumulation=8 // batch)
        ).bytes
        for recompute, batch in ((False, 8), (True, 8), (True, 4), (True, 2), (True, 1))
    }
    for limit, flags in (
        (needs[True, 8], "--recompute"),
        (needs[True, 8] - 1, "--micro-batch 4 --accumulation 2 --recompute"),
        (needs[True, 2], "--micro-batch 2 --accumulation 4 --recompute"),
    ):
        found = proposal(config, limit, measure)
        assert found is not None
        assert changed(config, found[0]) == flags
        assert measure(found[0]).bytes <= limit
        assert found[0].micro_batch * found[0].accumulation == 8
    assert proposal(config, needs[True, 1] // 2, measure) is None
