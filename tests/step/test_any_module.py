"""Any nn.Module trains: modes, buffers, random draws, unequal blocks, frozen parameters, losses with counts."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine.step.observer import Observer
from engine.step.segments import cut
from engine.step.step import Step
from engine.step.templates import difference, kinds
from models.llama import Llama, LlamaConfig
from models.segment import IGNORED, Segment
from optimizers.contract import Group, UsageError
from optimizers.partition import freeze, partition, trainable
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

slow = pytest.mark.slow
EPS, LR = 1e-4, 1e-2
Batch = dict[str, Tensor]


class Layer(nn.Module):
    """A residual block with all that makes training differ from evaluation."""

    def __init__(self, size: int = 6, dropout: float = 0.5, scale: float = 1.0) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(size, size, bias=False), nn.BatchNorm1d(size), nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.drop(self.norm(self.linear(x)))


def first(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    return module(batch["x"])


def middle(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    return module(x)


def last(module: nn.Module, x: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
    return cross_entropy(module(x), batch["y"], reduction="sum", ignore_index=IGNORED), (batch["y"] != IGNORED).sum()


class Stack(nn.Module):
    """Linear, blocks, Linear: on its own, or as a chain."""

    def __init__(self, blocks: list[nn.Module], size: int = 6) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, size), nn.ModuleList(blocks), nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def segments(self) -> list[Segment]:
        def names(prefix: str, module: nn.Module) -> dict[str, str]:
            return {n: f"{prefix}.{n}" for n, _ in module.named_parameters()}

        return [
            Segment("stem", self.stem, names("stem", self.stem), first),
            *(Segment("block", b, names(f"blocks.{i}", b), middle) for i, b in enumerate(self.blocks)),
            Segment("head", self.head, names("head", self.head), last),
        ]


def stack(dropout: float = 0.5, **options) -> Stack:
    torch.manual_seed(0)
    return Stack([Layer(dropout=dropout, **options) for _ in range(2)])


def data(step: int, count: int = 1, rows: int = 8, ignored: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    made = []
    for j in range(count):
        x = torch.randn(rows, 4, generator=generator)
        y = torch.randint(0, 3, (rows,), generator=generator)
        if ignored:
            y[: rows - 2 * j] = IGNORED  # the first micro-batch has no target at all
        made.append({"x": x, "y": y})
    return made


def whole(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch["x"])
    return cross_entropy(logits, batch["y"], reduction="sum", ignore_index=IGNORED), (batch["y"] != IGNORED).sum()


def make(model: nn.Module, rule=None, loss=None, **options) -> Step:
    params = dict(model.named_parameters())
    optimizer = partition(params, [Group("all", rule or adamw(eps=EPS), ("",), LR, 0.1)])
    options = dict(mode="off") | options
    return Step(cut(model, loss), params, optimizer, optimizer.init(params), **options)


def tensors(step: Step) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in {**step.params, **step.buffers}.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.equal(b[n]) for n, t in a.items())


# Modes.


@pytest.mark.parametrize("chain", [False, True], ids=["one", "segments"])
@pytest.mark.parametrize("mode", [True, False], ids=["model.train()", "model.eval()"])
def test_evaluation_is_in_evaluation_mode_and_training_in_training_mode(mode, chain):
    model = stack().train(mode)
    step = make(model, loss=None if chain else whole)
    before = tensors(step)
    (batch,) = data(0)
    found = [step.chain.loss(step.view(), batch) for _ in range(3)]
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
        step.chain.loss(step.view(), data(i)[0])
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
    stacked.chain.loss(stacked.view(), data(0)[0])
    assert torch.rand(4).equal(expected), "the caller's generator is as it was"
    assert len({tuple(t.tolist()) for t in one}) == 8, "2 steps, 2 micro-batches, 2 segments"
    assert all(a.equal(b) for a, b in zip(one, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(one, other, strict=True))


# Segments of one kind.


def twice(x: Tensor) -> Tensor:
    return 2 * x


def thrice(x: Tensor) -> Tensor:
    return 3 * x


def times(factor: float):
    return lambda x: factor * x


class Odd(nn.Module):
    """A block that reads everything that an attribute can be."""

    def __init__(self, **given) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, 6)
        self.scale, self.sizes, self.act, self.table = 1.0, (1, 2), twice, torch.ones(6)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.extra = [nn.Flatten(0, 0)]
        self.options = {"shift": 0.0, "nested": [1.0]}
        self.layer = 0
        self.register_buffer("shift", torch.full((6,), given.pop("buffered", 0.0)), persistent=False)
        for name, value in given.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.linear(x)) * self.scale * self.table + sum(self.sizes) + self.options["nested"][0]
        return x + self.inner(self.extra[0](y)) + self.options["shift"] + self.shift


UNEQUAL = {
    "scale": dict(scale=0.5),
    "sizes.1": dict(sizes=(1, 3)),
    "act": dict(act=thrice),
    "table": dict(table=torch.full((6,), 2.0)),
    "options.nested.0": dict(options={"shift": 0.0, "nested": [4.0]}),
    "inner._modules": dict(inner=nn.Sequential(nn.Linear(6, 6))),
    "inner.1": dict(inner=nn.Sequential(nn.Linear(6, 6), nn.Tanh())),
    "extra.0": dict(extra=[nn.ReLU()]),
    "unknown": dict(unknown=1),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("path", UNEQUAL)
def test_blocks_that_differ_are_run_as_what_they_are(path, recompute):
    model = Stack([Odd(), Odd(**UNEQUAL[path])])
    step = make(model, recompute=recompute)
    assert list(step.chain.apart) == ["block 2"] and step.chain.apart["block 2"].endswith(path)
    (batch,) = data(0)
    expected = whole(model, batch)[0].item()
    assert step.chain.loss(step.view(), batch)[0].item() == pytest.approx(expected, rel=1e-6)
    assert step([batch]).loss.item() == pytest.approx(expected / 8, rel=1e-6)


def test_blocks_that_are_alike_share_a_template_whatever_their_numbers():
    blocks = [Odd(), Odd(buffered=3.0), Odd(act=twice)]
    blocks[0].linear.weight.data.mul_(2)
    model = Stack(blocks)
    step = make(model)
    assert not step.chain.apart and set(step.chain.forwards) == {"stem", "block", "head"}
    (batch,) = data(0)
    assert step.chain.loss(step.view(), batch)[0].item() == pytest.approx(whole(model, batch)[0].item(), rel=1e-6)


def segment(module: nn.Module, call=middle, **options) -> Segment:
    return Segment("block", module, {n: n for n, _ in module.named_parameters()}, call, **options)


def hooked() -> nn.Module:
    block = Odd()
    block.linear.register_forward_hook(lambda module, given, out: out + 1)
    return block


def tied() -> nn.Module:
    block = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
    block[1].weight = block[0].weight
    return block


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (segment(Odd()), segment(Odd(), first), "call"),
        (segment(Odd(), lambda m, x, b: m(x)), segment(Odd(), lambda m, x, b: 2 * m(x)), "call"),
        (segment(Odd(act=times(2))), segment(Odd(act=times(3))), "module.act.factor"),
        (segment(Odd(), functools.partial(middle)), segment(Odd(), functools.partial(first)), "call.func"),
        (segment(Odd()), segment(hooked()), "module.linear._forward_hooks"),
        (segment(Odd()), segment(Odd().eval()), "module.training"),
        (segment(nn.Linear(6, 6)), segment(nn.Linear(6, 6, bias=False)), "module._parameters"),
        (segment(tied()), segment(nn.ModuleList([nn.Linear(6, 6, bias=False) for _ in "ab"])), "tied parameters"),
        (segment(Odd(layer=0)), segment(Odd(layer=1)), "module.layer"),
        (segment(Odd(layer=0), ignore=("layer",)), segment(Odd(layer=1), ignore=("layer",)), None),
        (segment(Odd(act=times(2))), segment(Odd(act=times(2))), None),
        (segment(Odd(scale=float("nan"))), segment(Odd(scale=float("nan"))), None),
    ],
)
def test_a_difference_is_named(one, other, named):
    assert difference(one, other) == named or str(difference(one, other)).startswith(f"{named}.")
    assert len(set(kinds([one, other, one])[0])) == (1 if named is None else 2)


# Frozen parameters.


def llama() -> Llama:
    return Llama(LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=16, initializer_range=0.1))


RULES = {"adamw": adamw(), "sgd": sgd(0.9), "muon": muon(), "galore": galore(4, 2), "snsm": snsm(4, 2)}
RULES |= {"sumo": sumo(4, 2)}
PROJ = r"_proj\.weight$"


def optimizer_of(name: str, model: Llama, params: dict[str, Tensor]):
    rule, _, wrapper = name.partition(" ")
    base = partition(params, [Group("rule", RULES[rule], (PROJ,), LR, 0.1), Group("rest", adamw(), ("",), LR, 0.1)])
    if wrapper == "omgd":
        return omgd(base, params, traversal(layers(params), Key(1), active=1, period=2))
    if wrapper == "lisa":
        return omgd(base, params, traversal(layers(params), Key(1), active=1, period=2, replacement=True), "none")
    if wrapper:
        from models.layers import attach

        names = [n for n in trainable(params) if n.endswith("_proj.weight")]
        attach(model, names, 4, wrapper)
        return rso(base, params, names, 4, period=2, form=wrapper)
    return base


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", [*RULES, "adamw omgd", "adamw lisa", "adamw merged", "adamw products"])
def test_a_frozen_parameter_has_no_gradient_no_state_and_does_not_move(method, recompute):
    model = llama()
    params = dict(model.named_parameters())
    freeze(params, (r"layers\.0\.mlp", "embed", r"norm\.weight$"))
    frozen = [n for n, p in params.items() if not p.requires_grad]
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = optimizer_of(method, model, params)
    state = optimizer.init(params)
    step = Step(cut(model), params, optimizer, state, mode="off", recompute=recompute)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    for i in range(5):
        step.turn(i)
        result = step([batch], step=i)
        assert not {n for names, _ in result.squares for n in names} & set(frozen)
    assert len(frozen) == 9 and not any(n.removeprefix("parked:") in frozen for n in step.state)
    assert all(params[n].equal(before[n]) and not params[n].requires_grad for n in frozen)
    moved = [n for n in params if n not in frozen and not params[n].equal(before[n])]
    assert moved and all(params[n].requires_grad for n in moved), "flags stay the module's own"
    if method == "adamw":
        assert len(moved) == len(params) - len(frozen)


def test_what_cannot_be_frozen_is_named():
    model = llama()
    params = dict(model.named_parameters())
    with pytest.raises(UsageError, match="pattern 'nothing' matches no parameter; the names look like"):
        freeze(params, ("nothing",))
    with pytest.raises(UsageError, match=r"'\(' is no regular expression"):
        freeze(params, ("(",))
    with pytest.raises(UsageError, match="there is nothing to train"):
        freeze(params, ("",))
    with pytest.raises(UsageError, match="every parameter is frozen"):
        partition(params, [Group("all", adamw(), ("",), LR)])
    model = llama()
    params = dict(model.named_parameters())
    part = {n: p for n, p in params.items() if "embed" not in n}
    optimizer = partition(part, [Group("all", adamw(), ("",), LR)])
    with pytest.raises(UsageError, match=r"'model.embed_tokens.weight' requires a gradient, and is owned by no group"):
        Step(cut(model), params, optimizer, optimizer.init(params), mode="off")


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
    assert len(step.chain.slices(16)) == 4
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
    summed, count = step.chain.loss(step.view(), batches[0])
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
