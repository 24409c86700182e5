"""How many kernels a compiled step launches: what inductor's scheduler would make of each graph, without making it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode


class Kernels(NamedTuple):
    """Of one graph: loops that the compiler writes, and calls of a library or of an operator of our own."""

    fused: int
    library: int

    @property
    def total(self) -> int:
        return self.fused + self.library


class _Counted(Exception):
    pass


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[Any], Any], list[Kernels]]]:
    """(what stands in for `compiled`, the kernels of each graph in the order in which they are met). Graphs run as they
    are. Fusion is that of the CPU, and differs in detail elsewhere."""
    found: list[Kernels] = []

    def count(graph: GraphLowering) -> None:
        graph.init_wrapper_code()
        graph._update_scheduler()
        nodes = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
        library = sum(isinstance(n, ExternKernelSchedulerNode) for n in nodes)
        found.append(Kernels(len(nodes) - library, library))
        raise _Counted

    def inner(gm: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        before = len(found)
        with config.patch(force_disable_caches=True), pytest.raises(Exception):  # noqa: B017
            compile_fx_inner(gm, inputs, **options)
        assert len(found) == before + 1, "the graph was counted"
        return make_boxed_func(gm.forward)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(gm, inputs, inner_compile=inner)

    with monkeypatch.context() as patched:
        patched.setattr(GraphLowering, "codegen", count)
        yield lambda f: torch.compile(f, backend=backend, fullgraph=True, dynamic=False), found
