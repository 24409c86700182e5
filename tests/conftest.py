"""What every test shares: threads, a compiler's cache for each kind of CPU code, nothing left over from another test.

The markers: `compiles` (torch.compile, inductor or aot), `run` (a process, a training run, seconds of its own), `slow`.
What has none of them runs in `make quick`.
"""

import functools
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch is loaded, and for processes that tests start. Tensors here are so small that threads wait for each
# other; OMP_NUM_THREADS=2 asks for two all the same.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
THREADS = int(os.environ["OMP_NUM_THREADS"])
# Kernels compiled for one instruction set fail under another, and inductor's cache does not tell them apart.
CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY")
if CAPABILITY and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"leanstep-inductor-{CAPABILITY}")

import pytest  # noqa: E402

for file in sorted((ROOT / "tests" / "helpers").glob("*.py")):  # their asserts say what both sides were
    pytest.register_assert_rewrite(f"helpers.{file.stem}")


def pytest_configure(config: pytest.Config) -> None:
    """Load what tests need, except in a process that only hands them out to others."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import hypothesis
    import torch

    for name in ("SIGHUP", "SIGQUIT"):  # under nohup they are ignored, in the processes that tests start too
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    torch.set_num_threads(THREADS)
    hypothesis.settings.register_profile("leanstep", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("leanstep")


def pytest_collection_finish() -> None:
    """What is there by now stays until the end: no collection of garbage looks through it again."""
    gc.freeze()


@pytest.fixture
def shared() -> Path:
    """Data beside the repository that not everybody has; the test is skipped without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the repository; it holds data too large to be in it")
    return folder


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Forget graphs after a test that compiled, so that each test counts its own recompiles. Imports nothing itself."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces and guards as ever, but runs graphs as they are: they are counted, not made fast."""
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture(params=["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What torch.compile compiles with: inductor in the slow tests. The fast ones trace, differentiate, decompose and
    partition as for inductor, and run the graphs as they are, as its C++ is most of what a compiled test costs."""
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    return str(request.param)
