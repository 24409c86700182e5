"""Text, one token at a time: which tokens may come next, and a draw among them from an explicit seed."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from .weights import Model


def probabilities(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (V,) -> the distribution (V,) to draw from, float32; the filters apply in the order temperature, k, p.

    Temperature 0 puts everything on the first largest logit. `top_k` keeps exactly the k likeliest tokens (0: all),
    `top_p` the fewest tokens that hold at least this much probability (1: all; at least one is always kept).
    """
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).index_fill_(0, logits.argmax(), 1.0)
    ordered, order = logits.float().sort(descending=True, stable=True)
    p = ((ordered - ordered[0]) / temperature).softmax(0)
    if top_k:
        p[top_k:] = 0
        p /= p.sum()
    if top_p < 1:
        p[p.cumsum(0) - p >= top_p] = 0  # what stands before this token is already enough
    return torch.zeros_like(p).index_copy_(0, order, p / p.sum())


def generate(
    model: Model,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Continue `ids`, yielding new tokens until `max_new_tokens`, `eos` (one or several, not yielded) or the last
    position.

    Draws come from a generator on the host: the same seed and probabilities give the same tokens on every device.
    Raises ValueError before the first token where an argument cannot be met.
    """
    positions, vocab = model.config.max_position_embeddings, model.config.vocab_size
    for name, value, ok, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "a finite number of at least 0 (0: greedy)"),
        ("top_k", top_k, top_k >= 0, "at least 0 (0: no limit)"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1: no limit)"),
    ):
        if not ok:
            raise ValueError(f"{name}: got {value}, expected {expected}")
    if not 0 < len(ids) <= positions:
        raise ValueError(
            f"prompt: got {len(ids)} tokens, expected 1 to max_position_embeddings = {positions}; "
            f"{'shorten it' if ids else 'give at least one token'}"
        )
    if strangers := [i for i in ids if not 0 <= i < vocab]:
        raise ValueError(
            f"prompt: got token {strangers[0]}, expected 0 to {vocab - 1} (vocab_size = {vocab}); "
            "use the tokenizer the model was trained with"
        )
    new = min(max_new_tokens, positions - len(ids) + 1)  # the last new token is never read, so it needs no position
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return _stream(model, ids, new, temperature, top_k, top_p, seed, ends)


@torch.no_grad()
def _stream(
    model: Model,
    ids: Sequence[int],
    new: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    ends: tuple[int, ...],
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.device
    caches = model.caches(limit=len(ids) + new - 1)
    unread = list(ids)
    for _ in range(new):
        x = model.hidden(torch.tensor([unread], device=device), caches)  # (1, T, C); T is 1 after the prompt
        logits = model.logits(x[0, -1])
        if not logits.isfinite().all():
            raise FloatingPointError("logits: got nan or infinity, expected finite numbers; use an earlier checkpoint")
        p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        token = int(torch.multinomial(p.cpu(), 1, generator=generator))
        if token in ends:
            return
        yield token
        unread = [token]


@torch.no_grad()
def answers(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]
) -> list[list[int]]:
    """The likeliest continuation of each prompt, all of them together: until one of `ends` (left out), the last
    position, or `max_new_tokens`.

    Rows begin at the same place, so nothing is padded: up to the shortest prompt's end all are read at once; from there
    on a token a step, a longer prompt's own until it is over. Raises ValueError for an empty prompt or one that is
    longer than the model.
    """
    positions, device = model.config.max_position_embeddings, model.embedding.device
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if not 0 < shortest <= longest <= positions:
        raise ValueError(f"prompt: got {shortest} to {longest} tokens, expected 1 to {positions}; shorten it")
    stop = min(longest + max_new_tokens, positions + 1)
    caches = model.caches(limit=stop - 1, batch=len(prompts))
    found: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    unread = torch.tensor([list(prompt[:shortest]) for prompt in prompts], device=device)
    for at in range(shortest, stop):
        drawn = model.logits(model.hidden(unread, caches)[:, -1]).argmax(-1).tolist()
        following = [prompt[at] if at < len(prompt) else drawn[i] for i, prompt in enumerate(prompts)]
        for i in [i for i in open_rows if at >= len(prompts[i])]:
            if following[i] in ends or len(found[i]) == max_new_tokens:
                open_rows.remove(i)
            else:
                found[i].append(following[i])
        if not open_rows or at + 1 == stop:
            break
        unread = torch.tensor([[token] for token in following], device=device)
    return found
