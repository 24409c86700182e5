"""Tokenizers behind one small interface: bytes, Hugging Face `tokenizer.json`, GPT-2's pair of files, BERT's
`vocab.txt`, sentencepiece.

Text is only ever text: "<|endoftext|>" written in a document is encoded as the characters it consists of, so that the
`eos` id marks the ends of documents and nothing else. No other special token is ever added.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from optimizers.contract import UsageError

from .ending import END_OF_TEXT, TOKENIZER_CONFIG, Vocabulary, end_of, read_beside
from .spans import Spans, byte_spans, spanning
from .unknown import Pack, Packed, packing, sentencepiece_packing

ACCEPTED = (
    "'byte', a Hugging Face tokenizer.json, vocab.bpe with encoder.json beside it (or vocab.json with merges.txt), "
    "BERT's vocab.txt, a sentencepiece .model, or a folder that holds one of these"
)
PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}  # GPT-2's form, under two names
WORDPIECE = "vocab.txt"

_BERT = frozenset({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"})

KEPT = "tokenizer"  # folder in a run that holds the vocabulary files, where there are any


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
    pack: Pack
    """Many texts to arrays of ids, and what of each cannot be said; `encode` and `encode_batch` dress it up."""
    unpack: Callable[[list[int]], str]
    files: tuple[Path, ...] = ()
    """The vocabulary files; the first of them loads the tokenizer again."""
    settings: tuple[tuple[str, Any], ...] = ()
    """What `tokenizer_config.json` must say beside those files, so that the same tokenizer is loaded again."""
    remark: str = ""
    """What a user should know of the choice of `eos`."""
    spans: Spans | None = None
    """Many texts to ids with their characters, marks such as `<|im_end|>` read as marks; None: it has none."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """Those marks by id; `decode` passes over them."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.pack(texts).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Never raises: special tokens and ids that mean nothing give no text, invalid UTF-8 gives U+FFFD."""
        return self.unpack([i for i in map(int, ids) if 0 <= i < self.vocab_size])

    def copy_to(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder that exists, so that it is loaded the same from there."""
        for file in self.files:
            if file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        if self.settings:
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(dict(self.settings), indent=1) + "\n", encoding="utf-8")


def load_tokenizer(spec: str, eos: str | int | None = None) -> Tokenizer:
    """A tokenizer from "byte" or from its files; `eos` is a token or an id, if not the one that the files name.

    Raises UsageError for a spec or files it cannot make one from, and for an `eos` that is not in the vocabulary.
    """
    if spec == "byte":
        if eos not in (None, 256, "256"):
            raise UsageError(f"--eos: got {eos!r}; with the tokenizer 'byte' documents end with id 256")
        return _byte()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = _inside(path)
    if not path.is_file():
        raise UsageError(f"tokenizer {spec!r}: neither a name nor a file; expected {ACCEPTED}")
    for vocabulary, merges in PAIRS.items():
        if path.name in (vocabulary, merges):
            return _gpt2(spec, path.with_name(vocabulary), path.with_name(merges), eos)
    if path.name == WORDPIECE:
        return _wordpiece(spec, path, eos)
    if path.suffix == ".json":
        return _huggingface(spec, path, eos)
    if path.suffix == ".model":
        return _sentencepiece(spec, path, eos)
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
    def pack(texts: list[str]) -> Packed:
        return Packed([np.frombuffer(text.encode(), np.uint8) for text in texts], [""] * len(texts))

    def unpack(ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    return Tokenizer("byte", 257, 256, "byte", pack, unpack, spans=byte_spans, marks={256: END_OF_TEXT[0]})


def _huggingface(name: str, path: Path, eos: str | int | None) -> Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"tokenizer {path}: not a tokenizer.json ({error}); expected {ACCEPTED}") from None
    return _wrap(name, core, "tokenizers", (path,), eos)


def _gpt2(name: str, vocabulary: Path, merges: Path, eos: str | int | None) -> Tokenizer:
    for here, missing in ((vocabulary, merges), (merges, vocabulary)):
        if not missing.is_file():
            raise UsageError(f"tokenizer {here}: {missing.name} is not beside it; put the other half there")
    try:
        core = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"tokenizer {vocabulary}, {merges.name}: damaged ({error}); expected {ACCEPTED}") from None
    _byte_level(core)
    return _wrap(name, core, "gpt2", (vocabulary, merges), eos)


def _sentencepiece(name: str, path: Path, eos: str | int | None) -> Tokenizer:
    try:
        core = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError or OSError, by version
        raise UsageError(f"tokenizer {path}: not a sentencepiece model ({error}); expected {ACCEPTED}") from None
    pieces = {core.id_to_piece(i): i for i in range(core.vocab_size())}
    control = {piece for piece, i in pieces.items() if core.is_control(i)}
    own = core.eos_id() if core.eos_id() >= 0 else None

    def token(i: int) -> str | None:
        return core.id_to_piece(i) if 0 <= i < core.vocab_size() else None

    end, remark = end_of(Vocabulary(path, pieces.get, token, control, own), eos)
    print_ = _fingerprint("sentencepiece", (path,))
    settings = (("eos_token", token(end)),)
    pack = sentencepiece_packing(core)
    return Tokenizer(name, core.vocab_size(), end, print_, pack, core.decode, (path,), settings, remark)


def _wordpiece(name: str, path: Path, eos: str | int | None) -> Tokenizer:
    """BERT's: lower case where tokenizer_config.json says so or, without it, where no token has a capital letter."""
    try:
        model = tokenizers.models.WordPiece.from_file(str(path), unk_token="[UNK]")
        words = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("[")]
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"tokenizer {path}: not a list of tokens ({error}); expected {ACCEPTED}") from None
    said = read_beside(path.parent, TOKENIZER_CONFIG).get("do_lower_case")
    lower = said if isinstance(said, bool) else all(word == word.lower() for word in words)
    core = tokenizers.Tokenizer(model)
    core.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.decoder = tokenizers.decoders.WordPiece()
    kind = "wordpiece-uncased" if lower else "wordpiece-cased"
    return _wrap(name, core, kind, (path,), eos, special=_BERT, do_lower_case=lower)


def _wrap(
    name: str,
    core: Any,
    kind: str,
    files: tuple[Path, ...],
    asked: str | int | None,
    special: frozenset[str] = frozenset(),
    **settings: Any,
) -> Tokenizer:
    """A tokenizer of the `tokenizers` library, kept from cutting, padding, chance or reading special tokens in text."""
    vocabulary: dict[str, int] = core.get_vocab()
    special |= {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    eos, remark = end_of(Vocabulary(files[0], vocabulary.get, core.id_to_token, special), asked)
    core.no_truncation()
    core.no_padding()
    core.add_special_tokens([core.id_to_token(eos)])
    core.encode_special_tokens = True
    if getattr(core.model, "dropout", None):
        core.model.dropout = None
    said = {"eos_token": core.id_to_token(eos), **settings}
    return Tokenizer(
        name,
        max(vocabulary.values()) + 1,
        eos,
        _fingerprint(kind, files),
        packing(core),
        core.decode,
        files,
        tuple(said.items()),
        remark,
        spanning(core),
        {i: token.content for i, token in core.get_added_tokens_decoder().items() if token.special},
    )


def _byte_level(core: Any) -> None:
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()


def _inside(folder: Path) -> Path:
    names = [
        "tokenizer.json",
        *PAIRS,
        *PAIRS.values(),
        *sorted(file.name for file in folder.glob("*.model")),
        WORDPIECE,
    ]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(f"tokenizer {folder}: no tokenizer in this folder; expected {ACCEPTED}")


def _fingerprint(kind: str, files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        data = file.read_bytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{kind}-{digest.hexdigest()}"
