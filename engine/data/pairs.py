"""Texts and pairs of texts as rows of one length: WordPiece or byte-level BPE, from a model's tokenizer.json.

Special tokens and the numbers of the two texts are those that the file says; what is too long is cut from the longer of
the two, a token at a time. Text is only ever text: "[SEP]" in it is encoded as the characters it consists of.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from optimizers.contract import UsageError

from .order import Ints

FILE = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
MASKS = ("[MASK]", "<mask>")


class Encoded(NamedTuple):
    """Rows of tokens one behind another: row k is [starts[k], starts[k + 1]). `targets`: int64, float32, or none."""

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.uint8]
    special: npt.NDArray[np.bool_]  # what the tokenizer added: [CLS], [SEP]
    starts: Ints
    targets: npt.NDArray[Any]
    cut: int  # rows that were too long

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens and targets."""
        digest = hashlib.sha256()
        for array in (self.ids, self.types, self.starts, self.targets):
            digest.update(f"{array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def rows(self, numbers: Sequence[int], length: int, pad: int) -> dict[str, Ints]:
        """input_ids, token_type_ids and attention_mask of these rows, int64 (n, length) each, filled up with `pad`.

        -1 is a blank: one token of padding that is seen, as attention to nothing has no value.
        """
        ids = np.full((len(numbers), length), pad, np.int64)
        types, mask = np.zeros_like(ids), np.zeros_like(ids)
        for i, k in enumerate(numbers):
            own = slice(self.starts[k], self.starts[k + 1]) if k >= 0 else slice(0, 0)
            size = own.stop - own.start
            ids[i, :size], types[i, :size], mask[i, : max(size, 1)] = self.ids[own], self.types[own], 1
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


class PairTokenizer:
    """The tokenizer of an encoder's folder."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where there is none, or one that adds no special tokens."""
        self.folder, self.file = folder, folder / FILE
        if not self.file.is_file():
            raise UsageError(f"{folder}: got no {FILE}, expected the tokenizer of the model; fetch it")
        try:
            self.core = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"{self.file}: is no tokenizer.json ({error}); fetch it again") from None
        self.core.no_padding()
        self.core.no_truncation()
        self.core.encode_special_tokens = True
        if getattr(self.core.model, "dropout", None):
            self.core.model.dropout = None
        self.vocab_size = max(self.core.get_vocab().values()) + 1
        self.added = self.core.num_special_tokens_to_add(True)
        if not self.added:
            raise UsageError(f"{self.file}: adds no special tokens around a text; give the tokenizer of an encoder")

    @classmethod
    def of_model(cls, folder: Path, vocabulary: int) -> "PairTokenizer":
        """That of the model in a folder, which knows so many tokens. Raises UsageError where the file has more."""
        found = cls(folder)
        if found.vocab_size > vocabulary:
            raise UsageError(
                f"--init: {found.file}: got a vocabulary of {found.vocab_size}, expected at most {vocabulary}, that of "
                "the model beside it; give the tokenizer that it was trained with"
            )
        return found

    @property
    def mask(self) -> int:
        """The id of the token that hides another one. Raises UsageError where there is none."""
        for token in MASKS:
            if (found := self.core.token_to_id(token)) is not None:
                return int(found)
        raise UsageError(f"{self.file}: got none of the tokens {', '.join(MASKS)}; give the tokenizer of a masked LM")

    def encode(self, texts: Sequence[tuple[str, ...]], targets: npt.NDArray[Any], length: int) -> Encoded:
        """Texts, or pairs, in rows of at most `length` tokens. Raises UsageError where no token of a text would fit."""
        found = self._cut(texts, length)
        return _encoded(found, targets, sum(bool(row.overflowing) for row in found))

    def pieces(self, texts: Sequence[str], length: int) -> Encoded:
        """Texts as rows of at most `length` tokens, as many of each as it needs, without targets. Raises UsageError
        where no token of a text would fit."""
        found = self._cut([(text,) for text in texts], length)
        return _encoded([row for one in found for row in (one, *one.overflowing)], np.zeros(0, np.int64), 0)

    def _cut(self, texts: Sequence[tuple[str, ...]], length: int) -> list[Any]:
        """The library's encodings, each cut to `length` tokens, with what follows as its `overflowing`."""
        if length <= self.added:
            raise UsageError(f"--sequence: got {length}, expected more than the {self.added} special tokens of a row")
        self.core.enable_truncation(length, strategy="longest_first")
        try:
            found: list[Any] = self.core.encode_batch([one if len(one) > 1 else one[0] for one in texts])
        finally:
            self.core.no_truncation()
        return found

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder that exists."""
        for name in (FILE, *BESIDE):
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)


def _encoded(found: Sequence[Any], targets: npt.NDArray[Any], cut: int) -> Encoded:
    return Encoded(
        _flat([row.ids for row in found], np.int32),
        _flat([row.type_ids for row in found], np.uint8),
        _flat([row.special_tokens_mask for row in found], np.bool_),
        np.cumsum([0, *(len(row.ids) for row in found)]).astype(np.int64),
        targets,
        cut,
    )


def _flat(rows: Sequence[Sequence[int]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)
