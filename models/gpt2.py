"""GPT-2 (Radford et al., 2019) with Hugging Face's parameter names: a chain embed -> blocks -> head.

Learned positions, LayerNorm with a bias before attention and MLP, one matrix for queries, keys and values, the tanh
form of GELU, and an output matrix that is the embedding. Matrices lie as Hugging Face's Conv1D has them, (in, out), and
are no nn.Linear: what works on those alone, as RSO does, does not work here.
Letters in shapes are those of `layers`.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .decoder import draw_normal, summed
from .gpt2_config import Gpt2Config
from .layers import Cache, allocate
from .packed import Documents, documents_of, seen
from .segment import IGNORED, Batch, Segment

# GPT-2 as Hugging Face has it, without dropout as nanoGPT pre-trains it, and one for a CPU: 11 M parameters.
PRESETS: dict[str, Gpt2Config] = {
    "demo": Gpt2Config(257, 384, 6, 6),
    "124m": Gpt2Config(),
    "355m": Gpt2Config(50257, 1024, 24, 16),
    "774m": Gpt2Config(50257, 1280, 36, 20),
    "1.5b": Gpt2Config(50257, 1600, 48, 25),
}


class Conv1D(nn.Module):
    """`x W + b`, weight (in, out): a Linear whose matrix lies the other way, as Hugging Face stores GPT-2."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Attention(nn.Module):
    """Causal self-attention, x (B, T, C) -> (B, T, C)."""

    def __init__(self, c: Gpt2Config) -> None:
        super().__init__()
        self.heads, self.dropout = c.num_attention_heads, c.attention_dropout
        self.c_attn, self.c_proj = Conv1D(c.hidden_size, 3 * c.hidden_size), Conv1D(c.hidden_size, c.hidden_size)
        self.resid_dropout = nn.Dropout(c.residual_dropout)

    def forward(self, x: Tensor, cache: Cache | None, documents: Documents | None) -> Tensor:
        q, k, v = rearrange(self.c_attn(x), "b t (s h d) -> s b h t d", s=3, h=self.heads)
        mask = None if documents is None else seen(documents, None)
        if cache is not None:
            start = cache.length
            k, v = cache.append(k, v)
            mask = x.new_ones(x.shape[1], start + x.shape[1], dtype=torch.bool).tril(start)
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal=mask is None)
        return self.resid_dropout(self.c_proj(rearrange(y, "b h t d -> b t (h d)")))


class MLP(nn.Module):
    """Two matrices with the tanh form of GELU between them, (..., C) -> (..., C)."""

    def __init__(self, c: Gpt2Config) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(c.hidden_size, c.inner_size), Conv1D(c.inner_size, c.hidden_size)
        self.dropout = nn.Dropout(c.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """One layer, (B, T, C) -> (B, T, C)."""

    def __init__(self, c: Gpt2Config) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon), Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon), MLP(c)

    def forward(self, x: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, documents)
        return x + self.mlp(self.ln_2(x))


class Embeddings(nn.Module):
    """Tokens and positions, (B, T) int64 -> (B, T, C); its parts are the model's."""

    def __init__(self, wte: nn.Embedding, wpe: nn.Embedding, drop: nn.Dropout) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = wte, wpe, drop

    def forward(self, input_ids: Tensor, start: int = 0, documents: Documents | None = None) -> Tensor:
        tokens = input_ids.shape[1]
        at = torch.arange(start, start + tokens, device=input_ids.device) if documents is None else documents.position
        return self.drop(self.wte(input_ids) + self.wpe(at))


class Stack(nn.Module):
    """Everything below the output matrix: input_ids (B, T) int64 -> (B, T, C), normed."""

    def __init__(self, c: Gpt2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size)
        self.wpe = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.drop = nn.Dropout(c.embedding_dropout)
        self.h = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)

    def forward(
        self, input_ids: Tensor, caches: list[Cache] | None = None, documents: Documents | None = None
    ) -> Tensor:
        start = caches[0].length if caches else 0
        x = Embeddings(self.wte, self.wpe, self.drop)(input_ids, start, documents)
        for i, block in enumerate(self.h):
            x = block(x, None if caches is None else caches[i], documents)
        return self.ln_f(x)


class Head(nn.Module):
    """The last segment's module, (..., C) -> logits (..., V): the last norm, and the embedding's matrix."""

    def __init__(self, ln_f: nn.LayerNorm, wte: nn.Embedding) -> None:
        super().__init__()
        self.ln_f, self.wte = ln_f, wte

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.ln_f(x), self.wte.weight)


class Gpt2(nn.Module):
    """GPT-2 for next-token prediction."""

    lm_head = None  # tied: the embedding is the output matrix

    def __init__(self, config: Gpt2Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.transformer = Stack(config)
        self.init_weights(seed)

    @property
    def embedding(self) -> Tensor:
        """The matrix of tokens (V, C)."""
        return self.transformer.wte.weight

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.
        Parameters hold nothing until `init_weights` or a checkpoint fills them."""
        allocate(self, device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As GPT-2's paper and nanoGPT: matrices from N(0, initializer_range²), those that end a residual branch by
        1/sqrt(2 layers) smaller; norms ones, biases zeros. On the meta device there is nothing to fill."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            last = name.endswith("c_proj.weight")
            std = self.config.initializer_range / (math.sqrt(2 * self.config.num_hidden_layers) if last else 1)
            draw_normal(p, std, generator)

    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel() for p in self.parameters())

    def hidden(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Normed hidden states (B, T, C) of input_ids (B, T); with `caches` the tokens continue those in them."""
        return self.transformer(input_ids, caches)

    def logits(self, x: Tensor) -> Tensor:
        """Normed hidden states (..., C) -> logits (..., V), in x's dtype."""
        return F.linear(x, self.embedding)

    def forward(
        self, input_ids: Tensor, caches: list[Cache] | None = None, documents: Documents | None = None
    ) -> Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V), as `Decoder.forward`."""
        return self.logits(self.transformer(input_ids, caches, documents))

    def loss(self, input_ids: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Mean cross entropy, as `Decoder.loss`."""
        x, targets = self.transformer(input_ids).flatten(0, 1), targets.flatten()
        parts = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([summed(self.logits(h), t) for h, t in parts]).sum() / (targets != IGNORED).sum()

    def caches(self, limit: int, batch: int = 1) -> list[Cache]:
        """One empty cache a layer, with room for `limit` tokens."""
        c = self.config
        shape = (batch, c.num_attention_heads, limit, c.hidden_size // c.num_attention_heads)
        return [Cache(self.embedding.new_empty(shape), self.embedding.new_empty(shape)) for _ in self.transformer.h]

    def segments(self) -> list[Segment]:
        """embed -> block x L -> head. The modules in it are the model's own: call it after moving the model."""
        t = self.transformer
        embedding, wte = Embeddings(t.wte, t.wpe, t.drop), {"wte.weight": "transformer.wte.weight"}
        head = {f"ln_f.{part}": f"transformer.ln_f.{part}" for part in ("weight", "bias")} | wte
        return [
            Segment("embed", embedding, {**wte, "wpe.weight": "transformer.wpe.weight"}, embed),
            *(
                Segment("block", layer, {n: f"transformer.h.{i}.{n}" for n, _ in layer.named_parameters()}, block)
                for i, layer in enumerate(t.h)
            ),
            Segment("head", Head(t.ln_f, t.wte), head, summed_loss, True, self.config.vocab_size),
        ]


def embed(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """First segment: batch["input_ids"] (B, T) -> (B, T, C)."""
    return module(batch["input_ids"], 0, documents_of(batch))


def block(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One layer: (B, T, C) -> (B, T, C); where the batch says "documents" and "positions", none sees another."""
    return module(x, None, documents_of(batch))


def summed_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """Last segment: x (..., C) and batch["targets"] (...) -> summed cross entropy, 0-d float32."""
    return summed(module(x), batch["targets"])
