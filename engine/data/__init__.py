"""Text to tokens to batches: files, tokenizers, the split, prepared folders, windows in their order."""

from .index import read_index, tokenizer_of
from .windows import IGNORED, Batches, Tokens

__all__ = ["IGNORED", "Batches", "Tokens", "read_index", "tokenizer_of"]
