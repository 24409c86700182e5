"""RSO in the engine: gradients, graphs, and memory counted."""

import pytest
import torch
from helpers.grids import few
from helpers.models import batches, llama
from helpers.models import graphs as compiled_graphs
from helpers.subspace import dense, full, hypers, make, matrices
from torch import Tensor
from torch._dynamo.utils import counters

from engine.memory import counted_peak
from engine.step.gradients import leaf
from engine.step.segments import cut
from engine.step.step import Step
from models.llama import PRESETS, Llama, LlamaConfig
from optimizers.contract import State
from optimizers.rules.sgd import sgd
from optimizers.wrappers.rso import SHARED, rso

slow = pytest.mark.slow


# The engine: gradients, graphs, memory.


def gradients(mode: str, form: str, share: tuple = ()) -> dict[str, Tensor]:
    """What SGD at rate 1 moved in one step, of every parameter: the gradient, times Pᵀ under RSO."""
    step = make(llama(2), form, 32, 10**6, sgd(0.0), sgd(0.0), 0.0, options={"share": share}, mode=mode)
    before = full(step)
    before = {n: p.detach().clone() for n, p in before.items()}
    step(batches(0), hypers(step.optimizer, 1.0), 0)
    return {n: p.detach() - before[n] for n, p in full(step).items()}


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("form", "share"),
    [
        ("merged", SHARED),
        *(
            pytest.param(form, share, marks=slow)
            for form, share in (("merged", ()), ("products", ()), ("products", SHARED))
        ),
    ],
)
def test_compiled_gradients_are_the_eager_ones(form, share, backend):
    """Of the first layer and of the norms above all, which a compiler has lost before without a word."""
    expected, got = gradients("off", form, share), gradients("segments", form, share)
    for name, g in expected.items():
        assert g.norm() > 1e-3, f"{name} has no gradient to compare"
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=1e-5 * g.abs().max().item(), msg=name)


def test_gradients_are_those_of_the_dense_model_in_the_subspace():
    reference = llama(2)
    names = matrices(reference)
    (batch,) = batches(0)
    loss = reference.loss(batch["input_ids"], batch["targets"])
    exact = dict(zip(names, torch.autograd.grad(loss, [reference.get_parameter(n) for n in names]), strict=True))
    p = make(llama(2), rank=32, period=10**6).state
    moved = gradients("off", "merged")
    for name, g in exact.items():
        torch.testing.assert_close(moved[name], -g @ p[name]["P"] @ p[name]["P"].T, rtol=1e-3, atol=1e-5)


def counted(period: int, form: str, steps: int) -> list[int]:
    torch._dynamo.reset()
    counters.clear()
    step = make(llama(2), form, period=period, options={"share": SHARED}, mode="segments")
    numbers = []
    for i in range(steps):
        assert step.switch(i) == (i > 0 and i % period == 0)
        step(batches(i), hypers(step.optimizer), i)
        numbers.append(compiled_graphs())
    return numbers


@pytest.mark.compiles
@pytest.mark.parametrize("form", few(["merged", "products"], "products"))
def test_a_turn_never_recompiles(form, traced):
    often, never = counted(10, form, 32), counted(1000, form, 3)
    assert set(often) == {often[0]} == {never[-1]}, (often, never)
    assert often[0] == 6, "forwards and updates of embedding, block and head"


UNIT = 4 * 128 * 256 * 4  # bytes of one (batch, sequence, hidden) tensor


def stack(form: str | None, share: tuple = (), mode: str = "off", layers: int = 4, **options) -> tuple[Step, list]:
    """Four blocks of hidden 256, 4 heads, intermediate 688, with 512 tokens, and rank 64."""
    model = Llama(LlamaConfig(512, 256, 688, layers, 4, max_position_embeddings=128))
    ids = torch.randint(0, 512, (4, 129), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    if form is not None:
        return make(model, form, 64, options={"share": share}, mode=mode, logits=2**24, **options), [batch]
    params, optimizer = dict(model.named_parameters()), dense(model)
    return Step(cut(model), params, optimizer, optimizer.init(params), mode=mode, **options), [batch]


def saved_units(form: str | None, share: tuple = (), mode: str = "off") -> float:
    """What the forward of a block keeps for backward, its input included, parameters and rotary tables not."""
    step, (batch,) = stack(form, share, mode)
    trainable, frozen = step.optimizer.split(step.params, step.state)
    params = {**frozen, **trainable}
    for name, p in params.items():
        p.requires_grad_(name in trainable)
    buffers = [b for segment in step.chain.segments for b in segment.module.buffers()]
    given, kept = {t.untyped_storage().data_ptr() for t in (*params.values(), *buffers)}, {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in given:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = step.chain.forward(0, params, None, batch)
    for i in range(1, 5):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x = step.chain.forward(i, params, leaf(x), batch)
        alive.append(x)
    return sum(kept.values()) / 4 / UNIT


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("form", "share", "mode", "least", "most"),
    [
        (None, (), "off", 20.77, 22),
        ("merged", (), "off", 17, 17.84),
        ("products", (), "off", 17, 17.84),
        pytest.param(None, (), "segments", 16.09, 18, marks=slow),
        pytest.param("merged", (), "segments", 13, 13.15, marks=slow),
        ("merged", SHARED, "segments", 12, 12.40),
        pytest.param("products", (), "segments", 13, 13.15, marks=slow),
        pytest.param("products", SHARED, "segments", 12, 12.40, marks=slow),
    ],
)
def test_bytes_kept_for_backward(form, share, mode, least, most):
    assert least <= saved_units(form, share, mode) <= most


@pytest.mark.run
@pytest.mark.parametrize(("mode", "recompute"), [("off", True), pytest.param("segments", True, marks=slow)])
def test_with_recompute_a_block_keeps_its_input(mode, recompute):
    peaks = []
    for layers in (4, 8):
        step, data = stack("merged", SHARED, mode, layers, recompute=recompute)
        for i in range(2):
            step(data, hypers(step.optimizer), i)
        peaks.append(counted_peak(lambda step=step, data=data: step(data, hypers(step.optimizer), 2)) / UNIT)
    assert 0.9 <= (peaks[1] - peaks[0]) / 4 <= 1.3


TABLE = {  # 10^9 bytes at two bytes a number: m and v dense and under RSO, P apart and shared, gradients of both
    "60m": (128, 0.232, 0.153, 0.009, 0.006, 0.116, 0.076),
    "130m": (256, 0.536, 0.294, 0.041, 0.027, 0.268, 0.147),
    "350m": (256, 1.472, 0.523, 0.109, 0.071, 0.736, 0.261),
    "1b": (512, 5.356, 1.565, 0.436, 0.285, 2.678, 0.782),
    "7b": (1024, 26.95, 6.62, 2.33, 1.53, 13.48, 3.31),
}


@pytest.mark.parametrize("size", few(TABLE, "60m", "7b"))
def test_state_and_gradients_have_the_sizes_of_the_table(size):
    rank, both, ours, apart, shared, grads, small = TABLE[size]
    with torch.device("meta"):
        model = Llama(PRESETS[size]).bfloat16()
    params, base = dict(model.named_parameters()), dense(model)
    digits = 2 if size == "7b" else 3

    def moments(state: State) -> float:
        return sum(s[k].numel() for s in state.values() for k in ("exp_avg", "exp_avg_sq")) * 2 / 1e9

    assert round(moments(base.init(params)), digits) == pytest.approx(both, abs=1.01 * 10**-digits)
    assert sum(p.numel() for p in params.values()) * 2 / 1e9 == pytest.approx(grads, abs=0.6 * 10**-digits)
    for share, expected in (((), apart), (SHARED, shared)):
        optimizer = rso(base, params, matrices(model), rank, share=share)
        state = optimizer.init(params)
        assert moments(state) == pytest.approx(ours, abs=0.6 * 10**-digits)
        p = {id(s["P"]): s["P"] for s in state.values() if "P" in s}.values()
        assert all(t.dtype == torch.bfloat16 and t.is_meta for t in p)
        assert sum(t.numel() for t in p) * 2 / 1e9 == pytest.approx(expected, abs=0.6 * 10**-digits)
        trainable, _ = optimizer.split(params, state)
        assert sum(t.numel() * t.element_size() for t in trainable.values()) / 1e9 == pytest.approx(
            small, abs=0.6 * 10**-digits
        )
