"""Any decoder of transformers as a chain embed -> blocks -> head, cut at its one list of equal blocks.

    model = AutoModelForCausalLM.from_pretrained(...)
    adopt(model)                    gives it segments(): the engine then runs it block by block, as our own decoders

The parts are the model's own modules, under its own names. What a model computes around its blocks (masks, angles of
positions, a scale of the embedding, a cap on the logits) is computed by its own forward, in which all parts but one
stand aside: so nothing here knows any family.

Rows of several documents are refused: they need masks that differ by row. Where a model's forward breaks the graph of
torch.compile, train it with mode="off".
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .segment import IGNORED, Batch, Segment

NUMBERS = ("layer_idx", "layer_id", "layer_number")  # which of the caches a layer would have
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is given beside its input


def adopt(model: Any) -> Any:
    """Give a decoder of transformers `segments()`; returns it. It must have memory, and is called once on two tokens.

    Raises ValueError where it has no single list of blocks, or does not work when it is cut there.
    """
    segments(model)
    model.segments = partial(segments, model)
    return model


def segments(model: Any) -> list[Segment]:
    """embed -> block x L -> head, of the model's own modules. Raises ValueError, as `adopt`."""
    base, name, blocks = _blocks(model)
    probe = _probe(model, base, blocks)
    full = {id(p): own for own, p in model.named_parameters()}
    embed = _stripped(base, name, nn.ModuleList(), probe.tail, nn.Identity())
    aside = _stripped(base, name, nn.ModuleList(), probe.tail, nn.Identity())
    for child, module in base.named_children():
        if child != name and child not in probe.tail and any(True for _ in module.parameters()):
            aside._modules[child] = _Nothing()
    head = copy.copy(model)
    head._modules = {
        own: _Tail([base._modules[one] for one in probe.tail], probe.output) if module is base else module
        for own, module in model._modules.items()
    }
    head._parameters = {}
    kinds: list[int] = []  # of each block, the first that is called as it is
    for i in range(len(blocks)):
        kinds.append(next(k for k in [*dict.fromkeys(kinds), i] if _alike(probe.calls[k], probe.calls[i], base, k, i)))
    cut = [Segment("embed", embed, _named(embed, full), _embed)]
    for i, block in enumerate(blocks):
        module = _Block(block, aside, name, len(blocks), kinds[i])
        cut.append(Segment("block", module, _named(module, full), _block, ignore=NUMBERS))
    cut.append(Segment("head", head, _named(head, full), _loss, True, int(model.config.get_text_config().vocab_size)))
    _checked(model, cut)
    return cut


def _blocks(model: Any) -> tuple[Any, str, nn.ModuleList]:
    """The module that owns the list of blocks, the list's name in it, and the list."""
    base = model.base_model
    lists = [(n, m) for n, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m)]
    equal = [(n, m) for n, m in lists if len({type(block) for block in m}) == 1]
    if base is model or len(equal) != 1 or len(lists) != 1:
        found = ", ".join(f"{n} of {len(m)} {type(m[0]).__name__}" for n, m in lists) or "none"
        raise ValueError(
            f"{type(model).__name__}: got these lists of blocks: {found}; expected exactly one, of equal blocks, below "
            "a head; train such a model as a chain of one, with a loss"
        )
    return base, *equal[0]


class _Probe:
    """What one forward of two tokens shows: how each block is called, what comes after the last, and the output."""

    calls: dict[int, Call]
    tail: list[str]
    output: Callable[..., Any]


def _probe(model: Any, base: Any, blocks: nn.ModuleList) -> _Probe:
    probe, last = _Probe(), len(blocks) - 1
    probe.calls, probe.tail = {}, []

    def called(i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        probe.calls[i] = args[1:], kwargs

    def after(child: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if last in probe.calls:
            probe.tail.append(child)

    def ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        probe.output = type(output)

    hooks = [block.register_forward_pre_hook(partial(called, i), with_kwargs=True) for i, block in enumerate(blocks)]
    hooks += [m.register_forward_pre_hook(partial(after, n)) for n, m in base.named_children() if m is not blocks]
    hooks.append(base.register_forward_hook(ended))
    try:
        with _quiet(model):
            model(input_ids=_two(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if sorted(probe.calls) != list(range(len(blocks))):
        raise ValueError(f"{type(model).__name__}: got a forward that does not call each block once; it cannot be cut")
    return probe


def _two(model: Any) -> Tensor:
    return torch.tensor([[0, 1]], device=next(model.parameters()).device)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Without gradients or draws, and then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _stripped(base: Any, name: str, blocks: nn.Module, tail: list[str], end: nn.Module) -> Any:
    """The base with other blocks, and nothing behind them. Its parts are the same modules."""
    stripped = copy.copy(base)
    stripped._modules = {**base._modules, name: blocks, **dict.fromkeys(tail, end)}
    return stripped


def _alike(one: Call, other: Call, base: Any, i: int, j: int) -> bool:
    """Are two blocks called with the same, and by their config for the same sort of layer?"""
    kinds = getattr(base.config, "layer_types", None)
    if kinds is not None and kinds[i] != kinds[j]:
        return False
    return _same(one, other)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a is b or a == b)


def _named(module: nn.Module, full: dict[int, str]) -> dict[str, str]:
    return {own: full[id(p)] for own, p in module.named_parameters()}


def _checked(model: Any, cut: list[Segment]) -> None:
    """Raises ValueError where the chain's loss is not the model's, or a parameter is in no segment."""
    ids = _two(model)
    x: Any = None
    with _quiet(model):
        for segment in cut:
            x = segment.call(segment.module, x, {"input_ids": ids, "targets": ids})
        expected = _summed(model(input_ids=ids, use_cache=False).logits, ids)
    missing = {n for n, _ in model.named_parameters()} - {n for segment in cut for n in segment.names.values()}
    if missing or not torch.allclose(x, expected, rtol=1e-3, atol=1e-3):
        what = f"the parameter {min(missing)} in no part" if missing else f"a loss of {x:.5f}, not {expected:.5f}"
        raise ValueError(f"{type(model).__name__}: got {what} when it is cut at its blocks; it cannot be cut there")


class _Nothing(nn.Module):
    """In the place of an embedding whose result is not used."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


class _Slot(nn.Module):
    """In the place of a block: it keeps how it was called."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return x


class _Block(nn.Module):
    """One block, called as the model's forward calls the one of number `like`."""

    def __init__(self, block: nn.Module, aside: Any, name: str, count: int, like: int) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.block, self.like = block, like
        self.aside = copy.copy(aside)
        self.aside._modules = {**aside._modules, name: nn.ModuleList(_Slot(self.calls) for _ in range(count))}

    def forward(self, x: Tensor) -> Tensor:
        self.calls.clear()
        self.aside(inputs_embeds=x, use_cache=False)
        args, kwargs = self.calls[self.like]
        self.calls.clear()
        out = self.block(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _Tail(nn.Module):
    """In the place of the model below the head: what comes after its blocks."""

    def __init__(self, modules: list[Any], output: Callable[..., Any]) -> None:
        super().__init__()
        self.after, self.output = nn.ModuleList(modules), output

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        for module in self.after:
            inputs_embeds = module(inputs_embeds)
        return self.output(last_hidden_state=inputs_embeds)


def _embed(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """batch["input_ids"] (B, T) -> (B, T, C)."""
    if "documents" in batch:
        raise ValueError("documents: got rows of several, expected one text a row: this model is not one of ours")
    out: Tensor = module(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return out


def _block(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One layer: (B, T, C) -> (B, T, C)."""
    out: Tensor = module(x)
    return out


def _loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """x (..., C) and batch["targets"] (...) -> summed cross entropy, 0-d float32."""
    assert x is not None
    rows = x if x.ndim == 3 else x[None]
    return _summed(module(inputs_embeds=rows, use_cache=False).logits, batch["targets"])


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
