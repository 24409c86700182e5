"""Text to tokens to batches: files, tokenizers, the split, prepared folders, windows in their order."""

from models.segment import IGNORED

from .index import read_index, tokenizer_of
from .windows import Batches, Tokens

__all__ = ["IGNORED", "Batches", "Tokens", "read_index", "tokenizer_of"]
