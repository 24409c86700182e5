"""LLaMA (Touvron et al., arXiv 2302.13971): the decoder as it is without options, and the sizes that recipes train."""

from .config import DecoderConfig as LlamaConfig
from .decoder import Decoder as Llama

__all__ = ["PRESETS", "Llama", "LlamaConfig"]


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
