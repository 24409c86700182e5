"""Modules of every kind, alone and as chains, their batches, and training steps with them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from engine.step.segments import cut
from engine.step.step import Step
from models.llama import Llama, LlamaConfig
from models.segment import IGNORED, Segment
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

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


# Segments of one kind.


def times(factor: float):
    return lambda x: factor * x


# Frozen parameters.


def llama() -> Llama:
    return Llama(LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=16, initializer_range=0.1))
