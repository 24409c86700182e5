"""Code that torch.compile keeps on disk is for one instruction set, and is not taken for another."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.runs import ROOT

from optimizers import compile as module
from optimizers.compile import compiled

SCRIPT = """
import torch
from optimizers import compile as module
from optimizers.compile import compiled
def norms(x): return torch.nn.functional.layer_norm(x, (129,)).square().sum(-1).sqrt()
x = torch.randn(37, 129)
torch.testing.assert_close(compiled(norms)(x), norms(x), rtol=1e-5, atol=1e-5)
print(torch.backends.cpu.get_cpu_capability())
"""


def test_the_key_of_compiled_code_names_the_instruction_set():
    before = torch.compiler.config.cache_key_tag  # not by monkeypatch: its undoing removes the name for good
    try:
        torch.compiler.config.cache_key_tag = "mine"
        compiled(torch.add)
        once = torch.compiler.config.cache_key_tag
        compiled(torch.add)
        assert once == torch.compiler.config.cache_key_tag == f"mine cpu:{torch.backends.cpu.get_cpu_capability()}"
    finally:
        torch.compiler.config.cache_key_tag = before


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.compiles
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs an x86 CPU")
def test_code_of_one_instruction_set_is_not_run_under_another(tmp_path):
    for capability in ("avx2", "default"):
        chosen = {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **chosen}
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == capability.upper()


@pytest.mark.compiles
@pytest.mark.parametrize("apart", [True, False])
def test_functions_of_one_def_do_not_share_a_limit_where_torch_cannot_tell_them_apart(apart, traced, monkeypatch):
    """As on a torch before 2.13, which has no `isolate_recompiles`."""

    def made(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
            return x * times + number

        return function

    monkeypatch.setattr(module, "_isolates", lambda: False)
    if not apart:
        monkeypatch.setattr(module, "_apart", lambda function: function)
    functions = [compiled(made(i)) for i in range(2 * torch._dynamo.config.recompile_limit)]

    def run() -> list[float]:
        return [float(function(torch.ones(()))) for function in functions]

    if apart:
        assert run() == [2.0 + i for i in range(len(functions))]
    else:
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run()
