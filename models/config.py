"""The shape of a decoder, whatever its family. What config.json says of it is read and written by `families`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from . import families
from .rope import Scaling, Yarn

LARGEST = 2**31 - 1  # of any size
POSITIONS = 2**24  # float32, in which angles are computed, tells no larger ones apart


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a model. Fields are named as in Hugging Face's config.json where it has them; ValueError where they
    do not fit."""

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
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    family: str = "llama"
    """config.json's model_type."""
    qkv_bias: bool = False
    """A bias in the projections to queries, keys and values."""
    output_bias: bool = False
    """A bias in the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Norms over each head of queries and keys, before the rotary embedding."""
    sliding_window: int | None = None
    """So many tokens, its own included, a token of `sliding_layers` sees."""
    sliding_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()
    """Layers without a rotary embedding."""
    rope_scaling: Scaling | Yarn | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                ok, expected = isinstance(value, bool), "True or False"
            elif field.type is float:
                ok, expected = type(value) in (int, float) and 0 < value < math.inf, "a finite number above 0"
            elif field.type is int or field.type == int | None:
                most = POSITIONS if field.name == "max_position_embeddings" else LARGEST
                ok, expected = type(value) is int and 0 < value <= most, f"a whole number of at least 1, at most {most}"
            else:
                continue
            if not ok and not (value is None and field.type == int | None):
                raise ValueError(f"{field.name}: got {value!r}, expected {expected}")
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of 2 * num_attention_heads = "
                f"{2 * self.num_attention_heads}: rotary embedding needs heads of an even size; change one of the two"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, expected an even number, as rotary embedding needs")
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.key_value_heads}, expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}: each key head serves as many query heads; change one of the two"
            )
        if (self.sliding_window is None) == bool(self.sliding_layers):
            raise ValueError(
                f"sliding_window: got {self.sliding_window} with sliding_layers {self.sliding_layers}; "
                "give both or none"
            )
        for name in ("sliding_layers", "nope_layers"):
            if strangers := set(getattr(self, name)) - set(range(self.num_hidden_layers)):
                raise ValueError(f"{name}: got {min(strangers)}, expected layers below {self.num_hidden_layers}")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees; None: all before it."""
        return self.sliding_window if layer in self.sliding_layers else None

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads. Special tokens are the tokenizer's: null here.

        Raises ValueError where the family does not have what this config asks for.
        """
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own |= {"num_key_value_heads": self.key_value_heads, "head_dim": self.head_size}
        written = families.write(own)
        back = DecoderConfig.from_hf(written)
        for field in fields(self):
            got, has = getattr(self._settled(), field.name), getattr(back, field.name)
            if got != has:
                raise ValueError(f"{field.name}: got {got!r}, which a model of the family {self.family!r} has not")
        return written

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read a config.json. ValueError where it lacks a size or asks for what no model here does."""
        return cls(**families.read(config))._settled()

    def _settled(self) -> "DecoderConfig":
        """The same shape in the form that equal shapes share."""
        usual = self.head_dim is not None and self.head_dim * self.num_attention_heads == self.hidden_size
        return replace(self, num_key_value_heads=self.key_value_heads, head_dim=None if usual else self.head_dim)
