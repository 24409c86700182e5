"""The layers of a decoder: Linear, RMSNorm, attention, SwiGLU and the block made of them.

Letters in shapes: B batch, T tokens, C hidden size, H query heads, K key and value heads, D head size.
Parameter names and numerics are Hugging Face's. Nothing here draws a random number on purpose: `Decoder.init_weights`
does, from a seed.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .packed import Documents, attend, for_kernel
from .rope import Rotary

SLOTS = ("P", "B")  # parameters of `attach`, which an optimizer's state stands in for


class Linear(nn.Linear):
    """`x Wᵀ`, weight (out, in), without a bias unless asked for.

    `attach` gives it a subspace: while P (in, r) and B (out, r) hold numbers it computes `x (W + B Pᵀ)ᵀ`, in one of
    two forms that keep `x P` for backward where a plain layer keeps x. Called without them it is plain.
    """

    P: nn.Parameter | None
    B: nn.Parameter | None
    form: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_parameter("P", None)
        self.register_parameter("B", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.P is None or self.B is None or self.P.is_meta:
            return super().forward(x)
        if self.form == "products":
            return products(x, self.weight, self.bias, self.P, self.B)
        return merged(x, self.weight, self.bias, self.P, self.B)


FORMS = ("merged", "products")


def merged(x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, b: Tensor) -> Tensor:
    """`x Wᵀ` where the weight in memory is already W + B Pᵀ: x (..., in) -> (..., out). B's values are not read.

    Backward gives dB = dYᵀ (x P), and no gradient of weight (which must be frozen) or P: of x it keeps x P alone.
    """
    y = F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return y
    return _Tap.apply(y, x.detach() @ p, b)


def products(x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, b: Tensor) -> Tensor:
    """`x Wᵀ + (x P) Bᵀ`, x (..., in) -> (..., out); with weight and P frozen autograd keeps x P alone.

    addmm adds into the first product: a sum of two products would be inlined by a compiler into all that reads it, and
    both would stay alive until backward.
    """
    flat = x.flatten(0, -2)
    y = torch.addmm(F.linear(flat, weight, bias), flat @ p, b.to(x.dtype).T)
    return y.view(*x.shape[:-1], -1)


class _Tap(torch.autograd.Function):
    """y (..., out) as it is, with a gradient for b (out, r) on the way back: dYᵀ z, z (..., r)."""

    @staticmethod
    def forward(y: Tensor, z: Tensor, b: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        (z,) = ctx.saved_tensors
        return dy, None, dy.flatten(0, -2).T @ z.flatten(0, -2)


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give the parameters of a model that was made on the meta device memory on `device`, a tensor at a time, in the
    dtypes they have. They hold nothing until they are drawn or read; slots of `attach` stay as they are."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta and name not in SLOTS:
                setattr(module, name, nn.Parameter(torch.empty_like(p, device=device), p.requires_grad))


def attach(module: nn.Module, names: Iterable[str], rank: int, form: str = "merged") -> None:
    """Give the Linear layers with these weights ("….weight", as `module` names its parameters) slots for P and B.

    The slots are parameters ….P (in, rank) and ….B (out, rank) on the meta device, without memory. Whoever runs the
    module with `torch.func.functional_call` passes tensors for both; a module that is simply called, as in generation,
    does not see them, and is the plain layer with the weight it has. `form` is "merged" or "products".

    It works on any nn.Linear, of any module: its class becomes `Linear`. What reads the weight without calling the
    layer (nn.MultiheadAttention, a tied output matrix) would bypass the slots. Call it once the module is where it
    shall stay, as parameters without memory cannot be moved; `detach` undoes it.

    Raises ValueError, having changed nothing, for a form it does not know, a rank above a layer's in_features, and a
    name that is not the weight of an nn.Linear, or of a subclass, whose forward might be another.
    """
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {FORMS}")
    layers: list[nn.Linear] = []
    modules = dict(module.named_modules())
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer = modules.get(path, module)
        if leaf != "weight" or not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear):
            raise ValueError(
                f"{name}: got a parameter of {type(layer).__name__}, expected the weight of an nn.Linear itself; "
                "train this parameter without a subspace"
            )
        if not 1 <= rank <= layer.in_features:
            raise ValueError(
                f"{name}: rank: got {rank}, expected at least 1 and at most its {layer.in_features} inputs"
            )
        layers.append(layer)
    for layer in layers:
        layer.__class__ = Linear
        assert isinstance(layer, Linear)
        layer.form = form
        for slot, size in (("P", layer.in_features), ("B", layer.out_features)):
            empty = torch.empty(size, rank, device="meta", dtype=layer.weight.dtype)
            layer.register_parameter(slot, nn.Parameter(empty))


def detach(module: nn.Module) -> None:
    """Take the slots out of every layer again, so that the module can be moved and its state_dict saved."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.P = layer.B = None


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
    """Causal self-attention, x (B, T, C) -> (B, T, C). With K < H each key head serves H/K query heads.

    Without `rotary` tokens have no positions. With `norm`, the eps of two RMSNorms, queries and keys are normed over
    each head first. With `window` a token sees so many tokens, itself and those right before it.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        key_value_heads: int,
        rotary: Rotary | None,
        *,
        head_size: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.head_size, self.grouped = head_size or hidden_size // heads, key_value_heads != heads
        self.rotary, self.window = rotary, window
        self.q_proj = Linear(hidden_size, heads * self.head_size, qkv_bias)
        self.k_proj = Linear(hidden_size, key_value_heads * self.head_size, qkv_bias)
        self.v_proj = Linear(hidden_size, key_value_heads * self.head_size, qkv_bias)
        self.o_proj = Linear(heads * self.head_size, hidden_size, output_bias)
        self.q_norm = None if norm is None else RMSNorm(self.head_size, norm)
        self.k_norm = None if norm is None else RMSNorm(self.head_size, norm)

    def forward(self, x: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        """`documents` says which tokens see each other and where they stand; not together with a cache."""
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        start = 0 if cache is None else cache.length
        if self.rotary is not None:
            at = start if documents is None else documents.position
            q, k = self.rotary(q, at), self.rotary(k, at)
        if documents is not None:
            y = attend(q, k, v, documents, self.window, self.grouped)
            return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))
        mask = self._mask(x, start, cache is not None)
        if cache is not None:
            k, v = cache.append(k, v)
        k, v, grouped = for_kernel(q, k, v, self.grouped)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))

    def _mask(self, x: Tensor, start: int, cached: bool) -> Tensor | None:
        """What each of the T tokens of x, the first at position `start`, sees: (T, start + T) bool; None: the plain
        triangle, which SDPA aligns at the top left, so that it is right without a cache only."""
        tokens = x.shape[1]
        windowed = self.window is not None and start + tokens > self.window
        if not cached and not windowed:
            return None
        seen = x.new_ones(tokens, start + tokens, dtype=torch.bool).tril(start)
        return seen.triu(start - self.window + 1) if windowed and self.window is not None else seen


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): `down(silu(gate x) * up x)`, (..., C) -> (..., C)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

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

    def forward(self, x: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, documents)
        return x + self.mlp(self.post_attention_layernorm(x))
