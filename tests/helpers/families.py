"""A small config.json of every family, with what sets it apart; and a model of it whose every part shows."""

from dataclasses import replace
from typing import Any

import torch

from models.config import DecoderConfig
from models.decoder import Decoder

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}


def _family(kind: str, **own: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **own}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _family("llama", rope_theta=500000.0),
    "llama, scaled": _family("llama", rope_theta=10000.0, rope_scaling=LLAMA3, head_dim=16),
    "llama, linear": _family("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, tie_word_embeddings=True),
    "llama, biases": _family("llama", attention_bias=True, mlp_bias=True),
    "mistral": _family("mistral", sliding_window=None, rms_norm_eps=1e-5),
    "mistral, sliding": _family("mistral", sliding_window=6, head_dim=12),
    "qwen2": _family("qwen2", rope_theta=1000000.0),
    "qwen2, yarn": _family("qwen2", rope_theta=100.0, rope_scaling={**YARN}),
    "qwen2, sliding": _family("qwen2", max_window_layers=2, tie_word_embeddings=True, **WINDOW),
    "qwen3": _family("qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3, sliding": _family("qwen3", head_dim=8, attention_bias=True, max_window_layers=1, **WINDOW),
    "smollm3": _family("smollm3"),
    "smollm3, sliding": _family("smollm3", no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=False, **WINDOW),
}


def config_of(name: str) -> DecoderConfig:
    return DecoderConfig.from_hf(FAMILIES[name])


def wide(config: DecoderConfig, seed: int = 1) -> Decoder:
    """A model whose weights are large enough for every part to show in the logits, norms and biases included."""
    model = Decoder(replace(config, initializer_range=0.2), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.0 if name.endswith(".bias") else 1.0, 0.3, generator=generator)
    return model
