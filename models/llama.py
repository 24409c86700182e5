"""LLaMA (Touvron et al., arXiv 2302.13971) with Hugging Face's parameter names and configuration fields."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MLP, Attention, Block, Cache, Linear, RMSNorm, Rotary
from .segment import IGNORED, Batch, Segment

DRAWN = 2**15  # numbers that initialisation draws at once
SLOTS = ("P", "B")  # parameters of `layers.attach`, which an optimizer's state stands in for
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # we have no other


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model. Fields are named as in Hugging Face's config.json; ValueError where they do not fit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """None: as many as num_attention_heads."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                ok, expected = isinstance(value, bool), "True or False"
            elif field.type is float:
                ok, expected = type(value) in (int, float) and 0 < value < math.inf, "a finite number above 0"
            else:
                ok, expected = type(value) is int and value > 0, "a whole number of at least 1"
            if not ok and not (value is None and field.name == "num_key_value_heads"):
                raise ValueError(f"{field.name}: got {value!r}, expected {expected}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of 2 * num_attention_heads = "
                f"{2 * self.num_attention_heads}: rotary embedding needs heads of an even size; change one of the two"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.key_value_heads}, expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}: each key head serves as many query heads; change one of the two"
            )

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers' LlamaForCausalLM reads. Special tokens are the tokenizer's: null here."""
        return {
            "architectures": ["LlamaForCausalLM"],
            **FIXED,
            **asdict(self),
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json. ValueError where it lacks a size or asks for what this model does not do."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # transformers 5, transformers 4
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in known]
        if missing:
            raise ValueError(f"config.json: got no {', '.join(missing)}; expected all sizes of a LLaMA, add them")
        self = cls(**known)
        asked = {**config, "rope_type": rope.get("rope_type", rope.get("type"))}
        for name, expected in {**FIXED, "head_dim": self.head_size, "rope_type": "default"}.items():
            if asked.get(name) not in (None, expected):
                raise ValueError(f"config.json: {name}: got {asked[name]!r}, expected {expected!r}; there is no other")
        return self


def _preset(hidden: int, intermediate: int, heads: int, layers: int, vocab: int = 32000) -> LlamaConfig:
    return LlamaConfig(vocab, hidden, intermediate, layers, heads)


# GaLore's sizes (arXiv 2403.03507), and one for a CPU. Another tokenizer: dataclasses.replace(preset, vocab_size=...).
PRESETS: dict[str, LlamaConfig] = {
    "demo": _preset(192, 512, 6, 6, vocab=257),  # 256 bytes and an end mark; 2.76 M parameters
    "60m": _preset(512, 1376, 8, 8),
    "130m": _preset(768, 2048, 12, 12),
    "350m": _preset(1024, 2736, 16, 24),
    "1b": _preset(2048, 5461, 32, 24),
    "7b": _preset(4096, 11008, 32, 32),
}


class Decoder(nn.Module):
    """Everything below the output matrix: input_ids (B, T) int64 -> (B, T, C), normed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        c = config
        rotary = Rotary(c.head_size, c.max_position_embeddings, c.rope_theta)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            Block(
                Attention(c.hidden_size, c.num_attention_heads, c.key_value_heads, rotary),
                MLP(c.hidden_size, c.intermediate_size),
                c.hidden_size,
                c.rms_norm_eps,
            )
            for _ in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)
        for i, block in enumerate(self.layers):
            x = block(x, None if caches is None else caches[i])
        return self.norm(x)


class Head(nn.Module):
    """The last segment's module, (..., C) -> logits (..., V). It owns nothing: its parts are the model's."""

    def __init__(self, norm: RMSNorm, lm_head: Linear) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = lm_head

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


class Llama(nn.Module):
    """A LLaMA for next-token prediction. A tied model has no `lm_head`: the embedding matrix is the output matrix."""

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.init_weights(seed)

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.

        Parameters hold nothing until `init_weights` or a checkpoint fills them; slots of `layers.attach` stay as they
        are. Buffers are filled.
        """
        for module in list(self.modules()):
            if isinstance(module, Rotary):
                module.fill(torch.device(device))
            for name, p in module.named_parameters(recurse=False):
                if p.is_meta and name not in SLOTS:
                    setattr(module, name, nn.Parameter(torch.empty_like(p, device=device), p.requires_grad))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all matrices from N(0, initializer_range²), on the host: the same on every device. Norms become ones.

        What is drawn exists a slice at a time beside the model. On the meta device there is nothing to fill; after
        `allocate` call this again.
        """
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.is_meta:
                continue
            if p.ndim == 1:
                p.fill_(1.0)
                continue
            flat = p.view(-1)
            for start, stop in _slices(len(flat)):
                draw = torch.empty(stop - start, dtype=torch.float32, device="cpu")
                flat[start:stop].copy_(draw.normal_(std=self.config.initializer_range, generator=generator))

    def num_parameters(self) -> int:
        """Elements of all parameters, a tied one counted once."""
        return sum(p.numel() for p in self.parameters())

    def logits(self, x: Tensor) -> Tensor:
        """Normed hidden states (..., C) -> logits (..., V), in x's dtype."""
        return F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def forward(self, input_ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """input_ids (B, T) int64 -> logits (B, T, V). With `caches`, the tokens continue those already in them."""
        return self.logits(self.model(input_ids, caches))

    def loss(self, input_ids: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
        """Mean cross entropy over targets that are not -100, 0-d float32; input_ids and targets (B, T) int64.

        Logits exist for `chunk` tokens at a time: under no_grad that bounds memory (autograd would keep them all).
        """
        x, targets = self.model(input_ids).flatten(0, 1), targets.flatten()
        parts = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([_summed(self.logits(h), t) for h, t in parts]).sum() / (targets != IGNORED).sum()

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
    """One layer: (B, T, C) -> (B, T, C)."""
    return module(x)


def summed_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """Last segment: x (..., C) and batch["targets"] (...) -> summed cross entropy, 0-d float32."""
    return _summed(module(x), batch["targets"])


def _slices(size: int) -> Iterator[tuple[int, int]]:
    """range(size) cut after every `DRAWN` numbers, so that the slices' draws are those of the whole: torch draws
    normal numbers sixteen at a time, and the last ones of a tensor whose size is no multiple of that once more."""
    cuts = [*range(0, max(size - DRAWN + 1, 1), DRAWN), size]
    yield from itertools.pairwise(cuts)


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
