"""Small models, their batches, and what two sets of tensors or two runs of a step are compared by."""

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from models.llama import Llama, LlamaConfig
from optimizers.state import State, parked_by, with_status

LR, VOCABULARY = 1e-2, 97


def llama(layers: int = 2, tied: bool = False, **sizes: int) -> Llama:
    """Weights larger than usual, so that gradients are too."""
    shape = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=16) | sizes
    return Llama(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=tied, initializer_range=0.1, **shape))


def copied(state: State) -> State:
    """The state in memory of its own, what is shared still shared. Tensors of a mapped file are aligned in another way,
    which may decide how a kernel adds up; what resumes a run copies them too."""
    made: dict[int, Tensor] = {}
    return {
        name: with_status(parked_by(slots), {slot: made.setdefault(id(t), t.clone()) for slot, t in slots.items()})
        for name, slots in state.items()
    }


def batches(step: int, count: int = 1) -> list[dict[str, Tensor]]:
    """Micro-batches of (2, 16) tokens; how many of the targets count differs from one to the next."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for j in range(count):
        tokens = torch.randint(0, VOCABULARY, (2, 17), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, : 3 + 2 * j] = -100
        made.append({"input_ids": tokens[:, :-1].contiguous(), "targets": targets})
    return made


def few_tokens(count: int) -> list[dict[str, Tensor]]:
    tokens = torch.arange(4).view(1, 4)
    return [{"input_ids": tokens, "targets": tokens}] * count


def rate(step: int) -> float:
    return LR * (1 - step / 100)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative distance of a tensor in `a` to its namesake."""
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in b)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]
