"""The decoder that all families here share, with Hugging Face's parameter names: a chain embed -> blocks -> head.

What sets LLaMA, Mistral, Qwen and SmolLM apart is in `config`. Blocks that differ, as those of a sliding window or
without a rotary embedding do, differ in an attribute.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig
from .layers import MLP, Attention, Block, Cache, Linear, RMSNorm, allocate
from .packed import Documents, documents_of
from .rope import Rotary
from .segment import IGNORED, Batch, Segment

DRAWN = 2**15  # numbers that initialisation draws at once


class Stack(nn.Module):
    """Everything below the output matrix: input_ids (B, T) int64 -> (B, T, C), normed."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        rotary = Rotary(c.head_size, c.max_position_embeddings, c.rope_theta, c.rope_scaling)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                Attention(
                    c.hidden_size,
                    c.num_attention_heads,
                    c.key_value_heads,
                    None if i in c.nope_layers else rotary,
                    head_size=c.head_size,
                    qkv_bias=c.qkv_bias,
                    output_bias=c.output_bias,
                    norm=c.rms_norm_eps if c.qk_norm else None,
                    window=c.window(i),
                ),
                MLP(c.hidden_size, c.intermediate_size, c.mlp_bias),
                c.hidden_size,
                c.rms_norm_eps,
            )
            for i in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, caches: list[Cache] | None = None, documents: Documents | None = None
    ) -> Tensor:
        x = self.embed_tokens(input_ids)
        for i, block in enumerate(self.layers):
            x = block(x, None if caches is None else caches[i], documents)
        return self.norm(x)


class Head(nn.Module):
    """The last segment's module, (..., C) -> logits (..., V). It owns nothing: its parts are the model's."""

    def __init__(self, norm: RMSNorm, lm_head: Linear) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


class Decoder(nn.Module):
    """A decoder for next-token prediction. A tied one has no `lm_head`: the embedding matrix is the output matrix."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.init_weights(seed)

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.

        Parameters hold nothing until `init_weights` or a checkpoint fills them; slots of `layers.attach` stay as they
        are. Buffers are filled.
        """
        allocate(self, device)
        for module in self.modules():
            if isinstance(module, Rotary):
                module.fill(torch.device(device))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all matrices from N(0, initializer_range²), on the host: the same on every device. Norms become ones,
        biases zeros.

        What is drawn exists a slice at a time beside the model. On the meta device there is nothing to fill; after
        `allocate` call this again.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            draw_normal(p, self.config.initializer_range, generator)

    def num_parameters(self) -> int:
        """Elements of all parameters, a tied one counted once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def embedding(self) -> Tensor:
        """The matrix of tokens (V, C)."""
        return self.model.embed_tokens.weight

    def hidden(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Normed hidden states (B, T, C) of input_ids (B, T); with `caches` the tokens continue those in them."""
        return self.model(input_ids, caches)

    def logits(self, x: Tensor) -> Tensor:
        """Normed hidden states (..., C) -> logits (..., V), in x's dtype."""
        return F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def forward(
        self, input_ids: Tensor, caches: list[Cache] | None = None, documents: Documents | None = None
    ) -> Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V). With `caches`, the tokens continue those already in them; with
        `documents`, each sees its own document only."""
        return self.logits(self.model(input_ids, caches, documents))

    def loss(self, input_ids: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Mean cross entropy over targets that are not -100, 0-d float32; input_ids and targets (B, T) int64.

        Logits exist for `chunk` tokens at a time: under no_grad that bounds memory (autograd would keep them all).
        """
        x, targets = self.model(input_ids).flatten(0, 1), targets.flatten()
        parts = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([summed(self.logits(h), t) for h, t in parts]).sum() / (targets != IGNORED).sum()

    def caches(self, limit: int, batch: int = 1) -> list[Cache]:
        """One empty cache a layer, with room for `limit` tokens."""
        weight, c = self.model.embed_tokens.weight, self.config
        shape = (batch, c.key_value_heads, limit, c.head_size)
        return [Cache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.model.layers]

    def segments(self) -> list[Segment]:
        """embed -> block x L -> head. The modules in it are the model's own: call it after moving the model."""
        lm_head, owner = self.lm_head, "lm_head"
        if lm_head is None:
            lm_head = Linear(self.config.hidden_size, self.config.vocab_size, device="meta")
            lm_head.weight, owner = self.model.embed_tokens.weight, "model.embed_tokens"
        names = {"norm.weight": "model.norm.weight", "lm_head.weight": f"{owner}.weight"}
        return [
            Segment("embed", self.model.embed_tokens, {"weight": "model.embed_tokens.weight"}, embed),
            *(
                Segment("block", layer, {n: f"model.layers.{i}.{n}" for n, _ in layer.named_parameters()}, block)
                for i, layer in enumerate(self.model.layers)
            ),
            Segment("head", Head(self.model.norm, lm_head), names, summed_loss, True, self.config.vocab_size),
        ]


def embed(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """First segment: batch["input_ids"] (B, T) -> (B, T, C)."""
    return module(batch["input_ids"])


def block(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One layer: (B, T, C) -> (B, T, C); where the batch says "documents" and "positions", none sees another."""
    return module(x, None, documents_of(batch))


def summed_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """Last segment: x (..., C) and batch["targets"] (...) -> summed cross entropy, 0-d float32."""
    return summed(module(x), batch["targets"])


def draw_normal(p: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill a contiguous tensor of any dtype and device from N(0, std²), drawn on the host a slice at a time."""
    flat = p.data.view(-1)
    for start, stop in _slices(len(flat)):
        draw = torch.empty(stop - start, dtype=torch.float32, device="cpu")
        flat[start:stop].copy_(draw.normal_(std=std, generator=generator))


def _slices(size: int) -> Iterator[tuple[int, int]]:
    """range(size) cut after every `DRAWN` numbers, so that the slices' draws are those of the whole: torch draws
    normal numbers sixteen at a time, and the last ones of a tensor whose size is no multiple of that once more."""
    cuts = [*range(0, max(size - DRAWN + 1, 1), DRAWN), size]
    yield from itertools.pairwise(cuts)


def summed(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross entropy of logits (..., V) over targets (...) that are not IGNORED, 0-d float32."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
