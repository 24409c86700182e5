"""What every test shares: the repository on the path, one thread, and no compiled code left over from another test."""

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # tensors here are so small that two would only wait for each other
hypothesis.settings.register_profile("leanstep", deadline=None, derandomize=True)
hypothesis.settings.load_profile("leanstep")


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
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
