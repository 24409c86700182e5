"""What compiled code allocates, read from its graphs: no code is generated and no compiler runs.

AOTAutograd traces forward and backward, and the partitioner of torch.compile decides what is kept between them: that
part is exact. Inside a graph, what gets memory of its own is what library calls (products, attention) return and read,
what reductions and scatters return, and the graph's results. Everything pointwise is computed where it is used, and
may take the place of an operand that nobody needs any more. Kernels between two library calls count as one, and a
later one joins an earlier one that reads the same.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .storages import Tally

aten, prims = torch.ops.aten, torch.ops.prims
INLINE = {  # pointwise, though torch does not tag them so
    aten.cat, aten.embedding, aten.index, aten.gather, aten.index_select, aten.clone, aten._to_copy, aten.full,
    aten.full_like, aten.empty, aten.zeros_like, aten.ones_like, aten.arange, aten.scalar_tensor, aten.lift_fresh_copy,
    aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter, aten.copy, aten.repeat, aten.flip, aten.fill,
    aten.new_empty, aten.new_full, aten.new_zeros, aten.tril, aten.triu, prims.convert_element_type, prims.iota,
    prims.inductor_lookup_seed, prims.inductor_random,
}  # fmt: skip
LOOPS = {  # a result of their own, from operands computed on the way
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.any, aten.all, aten.argmax,
    aten.argmin, aten.var_mean, aten.var, aten.std, aten.logsumexp, aten.index_put, aten._unsafe_index_put,
    aten.scatter, aten.scatter_add, aten.scatter_reduce,
}  # fmt: skip
VIEWS = {aten._unsafe_view, aten._reshape_alias, operator.getitem}


def fused(function: Callable[..., Any], tally: Tally) -> Any:
    """Stands in for `torch.compile(function)` on fake tensors: results of the same shapes, and the same memory."""
    graphs: dict[object, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        kinds = [(x.shape, x.stride(), x.dtype, x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        key = (spec, torch.is_grad_enabled(), *kinds)
        if key not in graphs:
            graphs[key] = aot_function(
                _flat(function, [Tensor if isinstance(x, Tensor) else x for x in leaves], spec),
                _compiler(tally),
                partition_fn=_partition,
                decompositions=select_decomp_table(),
                keep_inference_input_mutations=True,
            )
            with tally.paused():  # on stand-ins, because AOTAutograd never lets go of what it has traced with
                graphs[key](*(_made(x).requires_grad_(x.requires_grad) for x in tensors))
        return graphs[key](*tensors)

    return call


def _flat(function: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> Callable[..., Any]:
    """The function of its tensors alone, which stand where `leaves` says Tensor."""

    def flat(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return function(*tree_unflatten([next(rest) if x is Tensor else x for x in leaves], spec))

    return flat


def _partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
    """torch.compile's partitioner, which makes the seeds of random numbers in the fake mode of the compilation."""
    with V.set_fake_mode(detect_fake_mode(inputs) or FakeTensorMode()):
        return partition_fn(joint, inputs, **options)


def _compiler(tally: Tally) -> Callable[..., Any]:
    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return _Program(graph, tally)

    return compiler


class _Program:
    """A graph as buffers made and dropped, in order. Called with a list of inputs, which it empties."""

    _boxed_call = True  # AOTAutograd hands over its only references

    def __init__(self, module: fx.GraphModule, tally: Tally) -> None:
        self.tally = tally
        nodes = list(module.graph.nodes)
        self.inputs = [n for n in nodes if n.op == "placeholder"]
        self.constants = {n: getattr(module, n.target) for n in nodes if n.op == "get_attr"}
        calls = [n for n in nodes if n.op == "call_function"]
        results = nodes[-1].all_input_nodes
        self.results = nodes[-1].args[0]
        real = _real(calls, results) | {*self.inputs, *self.constants}

        behind: dict[fx.Node, frozenset[fx.Node]] = {}  # the buffers that a value is computed from, itself if it is one
        reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for n in nodes:
            reads[n] = frozenset().union(*(behind[i] for i in n.all_input_nodes))
            behind[n] = frozenset([n]) if n in real else reads[n]

        place = {n: float(i) for i, n in enumerate(calls) if n in real}
        for n in calls:  # a write back into an input happens as soon as the new value is there
            if _packet(n) is aten.copy_:
                place[n] = max((place.get(r, -1.0) for r in reads[n]), default=-1.0) + 0.5
        self.kernels: list[list[fx.Node]] = []
        made = dict.fromkeys([*self.inputs, *self.constants], -1)  # the kernel that makes a buffer
        for n in sorted(place, key=lambda n: place[n]):
            at = _joined(n, reads, made, self.kernels) if _light(n) else len(self.kernels)
            if at == len(self.kernels):
                self.kernels.append([])
            self.kernels[at].append(n)
            made[n] = at

        last: dict[fx.Node, int] = {}
        for i, kernel in enumerate(self.kernels):
            for n in kernel:
                last |= dict.fromkeys([n, *reads[n]], i)
        for n in results:
            last |= dict.fromkeys(behind[n], len(self.kernels))
        self.unused = [n for n in self.inputs if n not in last]
        self.dying: list[list[fx.Node]] = [[] for _ in self.kernels]
        for n, i in last.items():
            if i < len(self.kernels):
                self.dying[i].append(n)
        self.taken: dict[fx.Node, fx.Node] = {}  # a kernel's result -> the operand whose place it takes
        for kernel, dying in zip(self.kernels, self.dying, strict=True):
            free = set(dying)
            for n in reversed(kernel) if _light(kernel[0]) else ():
                fits = (r for r in free & reads[n] if _bytes(r.meta["val"]) == _bytes(n.meta["val"]))
                if (operand := next(fits, None)) is not None:
                    self.taken[n] = operand
                free -= reads[n]
        wanted = set(results)
        for n in reversed(calls):
            if n in wanted and n not in real:
                wanted.update(n.all_input_nodes)
        self.views = [n for n in calls if n in wanted and n not in real]

    def __call__(self, inputs: list[Any]) -> list[Any]:
        env: dict[fx.Node, Any] = {**dict(zip(self.inputs, inputs, strict=True)), **self.constants}
        inputs.clear()
        for n in self.unused:
            del env[n]
        for kernel, dying in zip(self.kernels, self.dying, strict=True):
            brief = set(kernel) & set(dying) if _light(kernel[0]) else set()
            for n in kernel:
                if n in self.taken:
                    env.pop(self.taken[n], None)
                if _packet(n) is not aten.copy_ and n not in brief:
                    env[n] = _made(n.meta["val"])
            for n in dying:
                env.pop(n, None)
        for n in self.views:
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), env.__getitem__)
            env[n] = n.target(*args, **kwargs)
        return list(fx.node.map_arg(self.results, env.__getitem__))


def _joined(
    n: fx.Node,
    reads: Mapping[fx.Node, frozenset[fx.Node]],
    made: Mapping[fx.Node, int],
    kernels: Sequence[Sequence[fx.Node]],
) -> int:
    """The kernel that computes n: the last one if that is no library call, else an earlier one that reads the same and
    comes after all that n needs, else a new one."""
    if kernels and _light(kernels[-1][0]):
        return len(kernels) - 1
    ready = max((made[r] for r in reads[n]), default=-1)
    large = {r for r in reads[n] if _bytes(r.meta.get("val")) == _bytes(n.meta["val"])}
    for at in range(len(kernels) - 1, ready, -1):
        if _light(kernels[at][0]) and any(large & reads[other] for other in kernels[at]):
            return at
    return len(kernels)


def _real(calls: Sequence[fx.Node], results: Sequence[fx.Node]) -> set[fx.Node]:
    """The calls whose results get memory, writes to inputs among them."""
    real, needed = set(), set(results)
    for n in reversed(calls):
        if _view(n):
            if n in needed:
                needed.update(n.all_input_nodes)
        elif _packet(n) in INLINE or torch.Tag.pointwise in getattr(n.target, "tags", ()):
            if n in needed:
                real.add(n)
        else:
            real.add(n)
            if not _light(n):
                needed.update(n.all_input_nodes)
    return real


def _packet(n: fx.Node) -> Any:
    """The operator without its overload."""
    return getattr(n.target, "overloadpacket", n.target)


def _view(n: fx.Node) -> bool:
    return _packet(n) in VIEWS or bool(getattr(n.target, "is_view", False))


def _light(n: fx.Node) -> bool:
    """Is it generated code, rather than a library call?"""
    packet = _packet(n)
    return (
        packet in INLINE
        or packet in LOOPS
        or packet is aten.copy_
        or torch.Tag.pointwise in getattr(n.target, "tags", ())
    )


def _made(value: Any) -> Any:
    """A fake tensor like this one, with memory of its own."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return type(value)(map(_made, value)) if isinstance(value, list | tuple) else value


def _bytes(value: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tree_leaves(value) if isinstance(t, Tensor))
