"""Rows that hold several documents: each has the logits that it has alone, in every family, with one static shape."""

import pytest
import torch
from helpers.families import FAMILIES, config_of, wide
from helpers.grids import few
from torch import Tensor

from models.decoder import Decoder
from models.packed import Documents, attend, flexible, seen
from models.rope import Rotary

LENGTHS = ((9, 17, 6, 8), (21, 1, 18), (40,))


def documents(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> Documents:
    numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in lengths]
    positions = [[i for length in row for i in range(length)] for row in lengths]
    return Documents(torch.tensor(numbers), torch.tensor(positions))


def ids_for(model: Decoder) -> Tensor:
    return torch.randint(model.config.vocab_size, (len(LENGTHS), 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", few(FAMILIES, "llama", "mistral, sliding", "qwen3", "smollm3, sliding"))
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(name: str) -> None:
    model = wide(config_of(name))
    ids = ids_for(model)
    packed = model(ids, documents=documents())
    assert packed.std() > 0.5, "small logits would be equal whatever the formula"
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            here = slice(start, start + length)
            torch.testing.assert_close(packed[row, here], model(ids[row : row + 1, here])[0], atol=1e-5, rtol=1e-5)
            start += length
    joined = model(ids)
    torch.testing.assert_close(packed[2], joined[2], atol=1e-5, rtol=1e-5)
    assert (packed[0, 9:] - joined[0, 9:]).abs().max() > 0.1, "joined, a document sees those before it"


def test_a_token_is_rotated_by_its_position_in_its_document() -> None:
    """Logits cannot tell: attention sees differences of positions only. What is stored in a cache could."""
    rotary, x = Rotary(8, 64, 1e4), torch.randn(3, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    turned = rotary(x, documents().position)
    assert torch.equal(turned[0, :, 9:26], rotary(x[:1, :, 9:26])[0])
    assert torch.equal(turned[1, :, 22:], rotary(x[1:2, :, 22:])[0]) and torch.equal(turned[2], rotary(x[2:])[0])


@torch.no_grad()
def test_the_queries_of_every_family_take_that_position(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    rotate = Rotary.forward
    monkeypatch.setattr(Rotary, "forward", lambda self, x, start=0: taken.append(start) or rotate(self, x, start))
    model = wide(config_of("llama"))
    model(ids_for(model), documents=documents())
    assert len(taken) == 2 * len(model.model.layers) and all(torch.equal(t, documents().position) for t in taken)


def tensors() -> tuple[Tensor, ...]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(LENGTHS), heads, 40, 16, generator=generator) for heads in (4, 2, 2))


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_flexible_attention_is_the_same(window: int | None) -> None:
    """Forward: torch has no backward of it on the CPU."""
    one, other = (attention(*tensors(), documents(), window, True) for attention in (attend, flexible))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.compiles
def test_flexible_attention_compiles_whole_and_once_for_all_documents() -> None:
    from torch._dynamo.testing import CompileCounter

    graphs = CompileCounter()
    compiled = torch.compile(lambda q, k, v, d: flexible(q, k, v, d, None, True), fullgraph=True, backend=graphs)
    with torch.no_grad():
        q, k, v = tensors()
        for lengths in (LENGTHS, LENGTHS[::-1], ((20, 20),) * 3):
            torch.testing.assert_close(
                compiled(q, k, v, documents(lengths)), attend(q, k, v, documents(lengths), None, True)
            )
    assert graphs.frame_count == 1


def test_what_is_seen() -> None:
    few = documents(((2, 3),))
    assert seen(few, None)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert seen(few, 2)[0, 0, 4].int().tolist() == [0, 0, 0, 1, 1]
