"""The builder: one way from a config to a model, an optimizer and a step, that takes no more memory than training."""

import pytest
import torch

from models import decoder
from models.llama import Llama, LlamaConfig

SHAPE = LlamaConfig(97, 24, 44, 2, 2, max_position_embeddings=32)


def drawn_whole(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights drawn a whole tensor at a time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Llama(config)
    whole = {}
    for name, p in model.named_parameters():
        made = torch.empty(p.shape)
        whole[name] = made.fill_(1.0) if p.ndim == 1 else made.normal_(std=0.02, generator=generator)
    return whole


@pytest.mark.parametrize("drawn", [16, 32, 48, 2**10, 2**15])
def test_weights_drawn_in_slices_are_those_drawn_whole(monkeypatch, drawn):
    monkeypatch.setattr(decoder, "DRAWN", drawn)
    expected = drawn_whole(SHAPE, 3)
    for name, p in Llama(SHAPE, seed=3).named_parameters():
        assert p.equal(expected[name]), name


@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 127, 128, 129, 1000])
def test_slices_cover_a_tensor_and_none_but_the_whole_is_short(monkeypatch, size):
    monkeypatch.setattr(decoder, "DRAWN", 64)
    cuts = list(decoder._slices(size))
    assert [i for a, b in cuts for i in range(a, b)] == list(range(size))
    assert all(b - a >= 64 and a % 64 == 0 for a, b in cuts) or cuts == [(0, size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_without_memory_is_the_one_made_with(dtype):
    with torch.device("meta"):
        model = Llama(SHAPE)
    model.to(dtype).allocate("cpu")
    model.init_weights(5)
    plain = Llama(SHAPE, seed=5).to(dtype)
    for (name, p), (other, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and p.dtype == q.dtype == dtype and p.equal(q)
    for p, q in zip(model.buffers(), plain.buffers(), strict=True):
        assert p.equal(q) and p.dtype == torch.float32
    assert len(set(map(id, model.buffers()))) == 2, "one table of angles for all blocks"
