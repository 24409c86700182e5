"""What the README tells people to type works."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from models.llama import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs_and_moves_every_parameter() -> None:
    config = LlamaConfig(32, 16, 16, 2, 2, max_position_embeddings=8)
    ids = torch.randint(0, 32, (2, 9))
    batch = {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}
    model = Llama(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code is not None
    scope = {"model": model, "batch": batch}
    exec(code[1].replace("optimizer.init(params))", 'optimizer.init(params), mode="off")'), scope)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.isfinite(torch.as_tensor(scope["loss"]))


@pytest.mark.run
def test_every_command_and_path_exists() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert len(modules) >= 4
    assert all(find_spec(module) for module in modules), modules
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / path.partition("#")[0]).exists(), path
