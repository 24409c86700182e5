"""ViT (Dosovitskiy et al., arXiv 2010.11929) with the parameter names of published folders: embed -> blocks -> head.

Letters in shapes: B images, C hidden size, T = 1 + patches, K classes. A batch holds "pixels" (B, channels, H, W) and
"targets" (B,) int64; a target that is IGNORED does not count. Every block is normed before its two halves.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .decoder import draw_normal
from .encoder_heads import class_loss
from .layers import Linear, allocate
from .segment import Batch, Segment
from .vit_config import ViTConfig


class Patches(nn.Module):
    """pixels (B, channels, H, W) -> (B, patches, C)."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """Patches behind a class token, with learned positions: (B, channels, H, W) -> (B, T, C)."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + c.patches, c.hidden_size))
        self.patch_embeddings = Patches(c)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embeddings(pixels)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.dropout(x + self.position_embeddings)


class SelfAttention(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.head_size, self.p = c.hidden_size // c.num_attention_heads, c.attention_probs_dropout_prob
        self.query = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)
        self.key = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)
        self.value = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b h t d", d=self.head_size)
            for project in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return rearrange(y, "b h t d -> b t (h d)")


class Dense(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.dense = Linear(size, out, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Attention(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(c)
        self.output = Dense(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.attention(x))


class Layer(nn.Module):
    """One block: (B, T, C) -> (B, T, C)."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Dense(c.hidden_size, c.intermediate_size)
        self.output = Dense(c.intermediate_size, c.hidden_size)
        self.layernorm_before = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.layernorm_before(x)))
        return x + self.dropout(self.output(F.gelu(self.intermediate(self.layernorm_after(x)))))


class Layers(nn.Module):
    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Base(nn.Module):
    """Everything below the classifier."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Layers(c)
        self.layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class Head(nn.Module):
    """The last segment's module: the class token, normed and classified. It owns nothing. (B, T, C) -> (B, K)."""

    def __init__(self, layernorm: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.layernorm, self.classifier = layernorm, classifier

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.layernorm(x[:, 0]))
        return out


class ViT(nn.Module):
    """A vision transformer that classifies: forward pixels (B, channels, H, W) -> logits (B, K)."""

    def __init__(self, config: ViTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vit = Base(config)
        self.classifier = Linear(config.hidden_size, len(config.labels), bias=True)
        self.init_weights(seed)

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.
        Parameters hold nothing until `init_weights` or a checkpoint fills them; slots of `layers.attach` stay."""
        allocate(self, device)

    @torch.no_grad()
    def init_weights(self, seed: int, names: frozenset[str] | None = None) -> None:
        """Draw all that is no vector from N(0, initializer_range²), on the host: the same on every device. Norms become
        ones, biases zeros. With `names` these alone. On the meta device nothing is filled."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta or (names is not None and name not in names):
                continue
            if p.ndim == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                draw_normal(p, self.config.initializer_range, generator)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.vit.embeddings(pixels)
        for layer in self.vit.encoder.layer:
            x = layer(x)
        return Head(self.vit.layernorm, self.classifier)(x)

    def segments(self) -> list[Segment]:
        """embed -> block x L -> head. The modules in it are the model's own: call it after moving the model."""
        layers, head = self.vit.encoder.layer, Head(self.vit.layernorm, self.classifier)
        own = {name: name if name.startswith("classifier.") else f"vit.{name}" for name, _ in head.named_parameters()}
        return [
            Segment("embed", self.vit.embeddings, _under(self.vit.embeddings, "vit.embeddings"), embed),
            *(
                Segment("block", layer, _under(layer, f"vit.encoder.layer.{i}"), block)
                for i, layer in enumerate(layers)
            ),
            Segment("head", head.train(self.training), own, class_loss),
        ]


def embed(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """First segment: batch["pixels"] (B, channels, H, W) -> (B, T, C)."""
    return module(batch["pixels"])


def block(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One layer, which sees nothing of the batch."""
    return module(x)


def _under(module: nn.Module, prefix: str) -> dict[str, str]:
    return {name: f"{prefix}.{name}" for name, _ in module.named_parameters()}
