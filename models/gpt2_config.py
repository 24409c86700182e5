"""The shape of a GPT-2, and what its config.json says of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .families import HARMLESS

LARGEST = 2**31 - 1  # of any size
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function
KEYS = {  # of config.json -> the field
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "embd_pdrop": "embedding_dropout",
    "resid_pdrop": "residual_dropout",
    "attn_pdrop": "attention_dropout",
}
FIXED: dict[str, Any] = {  # there is no other here
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
MORE_HARMLESS = ("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
DROPPED = ("summary_first_dropout",)  # of a head that is not here


def is_gpt2(config: Mapping[str, Any]) -> bool:
    """Is it the config.json of a GPT-2?"""
    return config.get("model_type") == "gpt2"


@dataclass(frozen=True)
class Gpt2Config:
    """The shape of a model, by default GPT-2 small; names are those of `DecoderConfig`. ValueError where they do not
    fit."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    intermediate_size: int | None = None
    """None: four times hidden_size."""
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        for name in (*sizes, "intermediate_size"):
            value = getattr(self, name)
            if not (type(value) is int and 0 < value <= LARGEST) and not (
                name == "intermediate_size" and value is None
            ):
                raise ValueError(f"{name}: got {value!r}, expected a whole number of at least 1, at most {LARGEST}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a finite number above 0")
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a share of at least 0 and below 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one of the two"
            )

    @property
    def inner_size(self) -> int:
        return self.intermediate_size or 4 * self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads. Special tokens are the tokenizer's: null here."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": ACTIVATIONS[0],
            **{key: getattr(self, field) for key, field in KEYS.items()},
            **FIXED,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gpt2Config":
        """Read a config.json; what it does not say is as transformers takes it. ValueError where it asks for what is
        not here."""
        usual = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
        given = {**usual, **{key: value for key, value in config.items() if key in KEYS and value is not None}}
        if (activation := config.get("activation_function", ACTIVATIONS[0])) not in ACTIVATIONS:
            raise ValueError(
                f"config.json: activation_function: got {activation!r}, expected {ACTIVATIONS[0]!r}; there is no other"
            )
        for key, value in config.items():
            if key in FIXED and value is not None and value != FIXED[key]:
                raise ValueError(f"config.json: {key}: got {value!r}, expected {FIXED[key]!r}; there is no other")
            known = key in KEYS or key in FIXED or key in HARMLESS or key in (*MORE_HARMLESS, *DROPPED)
            if not known and key != "activation_function" and value is not None:
                raise ValueError(
                    f"config.json: {key}: got {value!r}, which no gpt2 here knows and which may change the model; "
                    "remove the key if it does not"
                )
        return cls(**{KEYS[key]: value for key, value in given.items()})
