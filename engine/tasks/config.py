"""Settings of a run on text, beside those of every run."""

from dataclasses import dataclass
from typing import Literal

from ..config import RunConfig


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """The text, how it becomes tokens, and how many of them are a row."""

    data: tuple[str, ...] = ()
    """Text to train on: .txt .md .py ..., or rows in .jsonl .json .csv .tsv .parquet .arrow, each also as .gz .xz .bz2
    or .zst; folders and globs of these; or a folder made by tools.prepare. Without it: the sources of this Python's
    standard library."""
    validation: tuple[str, ...] = ()
    """Held-out text. Without it, a part of the documents of `data` is set aside and never trained on."""
    field: str = "text"
    """The field, or column, of a row that holds its text."""
    allow_malformed: float = 0.0
    """The share of the rows that may be malformed and left out; 0 stops at the first."""
    tokenizer: str = "byte"
    """"byte", or a path: tokenizer.json, a vocab.bpe + encoder.json pair, vocab.txt, a sentencepiece .model, or the
    folder that holds one of them."""
    eos: str | None = None
    """The token, or its id, that ends every document; by default what the files beside the tokenizer name."""
    allow_unknown: float = 0.01
    """The share of the text's characters that the tokenizer may be unable to say; above it nothing is trained."""
    sequence: int = 256
    """Tokens per sequence."""
    documents: Literal["joined", "apart"] = "joined"
    """Apart: no document of a sequence sees another one, and positions restart in each; joined: a token sees whatever
    stands before it."""
    eval_windows: int = 64
    """Held-out sequences per evaluation."""

    def check(self) -> None:
        super().check()
        for name in ("sequence", "eval_windows"):
            self.at_least(name, 1)
