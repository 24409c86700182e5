"""The layers of a LLaMA: Linear, RMSNorm, rotary embedding, attention, SwiGLU and the block made of them.

Letters in shapes: B batch, T tokens, C hidden size, H query heads, K key and value heads, D head size (C = H D).
Parameter names and numerics are Hugging Face's LlamaForCausalLM's. Nothing here draws a random number on purpose:
`Llama.init_weights` does, from a seed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Linear(nn.Linear):
    """`x Wᵀ`, weight (out, in), without a bias unless asked for."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)


class RMSNorm(nn.Module):
    """`w * x / rms(x)` over the last dimension (Zhang & Sennrich, arXiv 1910.07467).

    The mean of squares and the quotient are float32 whatever x is; they are rounded to x's dtype *before* the weight
    (C,), which stays in its parameter's dtype, as Hugging Face does it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        return self.weight * (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), pairing element i with i + D/2 ("rotate half").

    `cos` and `sin` are non-persistent buffers (positions, D/2), float32: element [t, i] belongs to the angle
    t * theta^(-2i/D). They stay float32 when the model is cast, and are computed on the host and then moved, so that
    they are the same on every device. All blocks of a model share one Rotary.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_size: int, positions: int, theta: float) -> None:
        super().__init__()
        self.head_size, self.positions, self.theta = head_size, positions, theta
        self.fill(torch.get_default_device())

    def fill(self, device: torch.device) -> None:
        """Compute both tables anew and put them on `device`."""
        exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device="cpu") / self.head_size
        position = torch.arange(self.positions, dtype=torch.float32, device="cpu")
        angle = torch.outer(position, 1.0 / self.theta**exponent)
        self.register_buffer("cos", angle.cos().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """Follow the model to another device but not to another dtype; `to_empty` leaves filled tables too."""
        self.fill(fn(self.cos).device)
        return self

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate x (B, heads, T, D) whose first token stands at position `start`, in float32; returns x's dtype."""
        stop = start + x.shape[-2]
        if stop > self.positions:
            raise ValueError(
                f"sequence: got {stop} tokens, expected at most max_position_embeddings = {self.positions}; "
                "shorten the sequence or build the model with more positions"
            )
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Cache:
    """Keys and values one attention layer has seen, in two buffers (B, K, limit, D) allocated once; generation only."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value, self.length = key, value, 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new tokens (B, K, T, D) behind the old ones; returns views of all tokens so far."""
        start, self.length = self.length, self.length + key.shape[-2]
        self.key[:, :, start : self.length] = key
        self.value[:, :, start : self.length] = value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]


class Attention(nn.Module):
    """Causal self-attention, x (B, T, C) -> (B, T, C). With K < H each key head serves H/K query heads."""

    def __init__(self, hidden_size: int, heads: int, key_value_heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.head_size, self.grouped = hidden_size // heads, key_value_heads != heads
        self.rotary = rotary
        self.q_proj = Linear(hidden_size, heads * self.head_size)
        self.k_proj = Linear(hidden_size, key_value_heads * self.head_size)
        self.v_proj = Linear(hidden_size, key_value_heads * self.head_size)
        self.o_proj = Linear(heads * self.head_size, hidden_size)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        start, mask = 0, None
        if cache is not None:  # is_causal aligns the triangle at the top left: right only for a first call
            start = cache.length
            mask = x.new_ones(x.shape[1], start + x.shape[1], dtype=torch.bool).tril(start)
        q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): `down(silu(gate x) * up x)`, (..., C) -> (..., C)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer, (B, T, C) -> (B, T, C): attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, attention: Attention, mlp: MLP, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))
