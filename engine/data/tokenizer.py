"""Tokenizers behind one small interface: bytes, Hugging Face `tokenizer.json`, GPT-2's pair of files, sentencepiece.

Text is only ever text: "<|endoftext|>" written in a document is encoded as the characters it consists of, so that the
`eos` id marks the ends of documents and nothing else. No other special token is ever added.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from optimizers.core import UsageError

Ids = npt.NDArray[np.integer[Any]]

ACCEPTED = (
    "'byte', a Hugging Face tokenizer.json, vocab.bpe with encoder.json beside it (or vocab.json with merges.txt), "
    "a sentencepiece .model, or a folder that holds one of these"
)
END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}  # GPT-2's form, under two names


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `load_tokenizer` makes one."""

    name: str
    """What it was loaded from."""
    vocab_size: int
    """One more than the greatest id; some ids below may be unused."""
    eos: int
    """The id that ends a document."""
    fingerprint: str
    """Equal for equal vocabulary files, wherever they lie."""
    pack: Callable[[list[str]], list[Ids]]
    """Many texts to arrays of ids: the fast way in, which `encode` and `encode_batch` dress up."""
    unpack: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()
    """The vocabulary files; the first of them loads the tokenizer again."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.pack(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Never raises: special tokens and ids that mean nothing give no text, invalid UTF-8 gives U+FFFD."""
        return self.unpack([i for i in map(int, ids) if 0 <= i < self.vocab_size])


def load_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer from "byte" or from its files. Raises UsageError for a spec or files it cannot make one from."""
    if spec == "byte":
        return _byte()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = _inside(path)
    if not path.is_file():
        raise UsageError(f"tokenizer {spec!r}: neither a name nor a file; expected {ACCEPTED}")
    for vocabulary, merges in PAIRS.items():
        if path.name in (vocabulary, merges):
            return _gpt2(spec, path.with_name(vocabulary), path.with_name(merges))
    if path.suffix == ".json":
        return _huggingface(spec, path)
    if path.suffix == ".model":
        return _sentencepiece(spec, path)
    raise UsageError(f"tokenizer {spec!r}: not a kind of file that holds a tokenizer; expected {ACCEPTED}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE; returns the content of a `tokenizer.json`. The same texts give the same tokenizer.

    Id 0 is "<|endoftext|>", then come the 256 bytes, then merges; a small corpus may give fewer than `vocab_size`.
    """
    if vocab_size < 257:
        raise UsageError(f"train_bpe: got {vocab_size}; expected at least 257, for the bytes and the end of text")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    _byte_level(bpe)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return str(bpe.to_str(pretty=True))


def _byte() -> Tokenizer:
    def pack(texts: list[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def unpack(ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    return Tokenizer("byte", 257, 256, "byte", pack, unpack)


def _huggingface(name: str, path: Path) -> Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"tokenizer {path}: not a tokenizer.json ({error}); expected {ACCEPTED}") from None
    return _wrap(name, core, "tokenizers", (path,))


def _gpt2(name: str, vocabulary: Path, merges: Path) -> Tokenizer:
    for here, missing in ((vocabulary, merges), (merges, vocabulary)):
        if not missing.is_file():
            raise UsageError(f"tokenizer {here}: {missing.name} is not beside it; put the other half there")
    try:
        core = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"tokenizer {vocabulary}, {merges.name}: damaged ({error}); expected {ACCEPTED}") from None
    _byte_level(core)
    return _wrap(name, core, "gpt2", (vocabulary, merges))


def _sentencepiece(name: str, path: Path) -> Tokenizer:
    try:
        core = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError or OSError, by version
        raise UsageError(f"tokenizer {path}: not a sentencepiece model ({error}); expected {ACCEPTED}") from None
    pieces = {core.id_to_piece(i): i for i in range(core.vocab_size())}
    eos = core.eos_id() if core.eos_id() >= 0 else _end(path, pieces)

    def pack(texts: list[str]) -> list[Ids]:
        return [np.array(ids, np.uint32) for ids in core.encode(texts)]

    return Tokenizer(name, core.vocab_size(), eos, _fingerprint("sentencepiece", (path,)), pack, core.decode, (path,))


def _wrap(name: str, core: Any, kind: str, files: tuple[Path, ...]) -> Tokenizer:
    """A tokenizer of the `tokenizers` library, kept from cutting, padding or reading special tokens in text."""
    vocabulary: dict[str, int] = core.get_vocab()
    eos = _end(files[0], vocabulary)
    core.no_truncation()
    core.no_padding()
    core.add_special_tokens([core.id_to_token(eos)])
    core.encode_special_tokens = True

    def pack(texts: list[str]) -> list[Ids]:
        return [np.array(row.ids, np.uint32) for row in core.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(name, max(vocabulary.values()) + 1, eos, _fingerprint(kind, files), pack, core.decode, files)


def _byte_level(core: Any) -> None:
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()


def _inside(folder: Path) -> Path:
    names = ["tokenizer.json", *PAIRS, *PAIRS.values(), *sorted(file.name for file in folder.glob("*.model"))]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"tokenizer {folder}: no tokenizer in this folder; expected {ACCEPTED}")


def _end(path: Path, vocabulary: Mapping[str, int]) -> int:
    for name in END_OF_TEXT:
        if name in vocabulary:
            return vocabulary[name]
    raise UsageError(f"tokenizer {path}: no token to end documents with; add one of {' '.join(END_OF_TEXT)}")


def _fingerprint(kind: str, files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        data = file.read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{kind}-{digest.hexdigest()}"
