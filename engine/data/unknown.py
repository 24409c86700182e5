"""Characters that a tokenizer cannot represent, counted by document, whatever the tokenizer does with them.

Some tokenizers put an unknown token in its place, some leave it out without a word, some raise. Here all of them are
made to show it, by an unknown token that is added where there is none and taken out again from what comes back.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

Ids = npt.NDArray[np.integer[Any]]

_STRANGER = "\ufdd0unknown\ufdd1"  # two code points that are no characters, so that no text holds it
_NO_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that valid text never has, and some vocabularies neither


class Packed(NamedTuple):
    """Texts as ids, and the characters of each that the tokenizer cannot say."""

    ids: list[Ids]
    lost: list[str]


Pack = Callable[[list[str]], Packed]


def packing(core: Any) -> Pack:
    """How a tokenizer of the `tokenizers` library encodes texts. It has to be set up before; it is not changed."""
    if says_everything(core):
        return lambda texts: Packed(_rows(core, texts), [""] * len(texts))
    spec = json.loads(core.to_str())
    own = unknown_id(spec["model"])
    if own is not None:
        return _packing_with(core, own)
    counting, unknown, ids = with_unknown(core, spec)
    counting.encode_special_tokens = True

    def pack(texts: list[str]) -> Packed:
        rows = _rows(counting, texts)
        lost = _lost(counting, unknown, _STRANGER, texts, rows)
        known: list[Ids] = [ids[row[row != unknown]].astype(np.uint32) for row in rows]
        for k, said in enumerate(lost):
            if said and (left := _left_out(core, texts[k])) is not None:
                known[k] = left
        return Packed(known, lost)

    return pack


def with_unknown(core: Any, spec: dict[str, Any]) -> tuple[Any, int, npt.NDArray[np.int64]]:
    """A copy of a tokenizer that has no unknown token, whose content is `spec`, with one; its id there; and the id of
    every token of the copy in the tokenizer itself, -1 for none."""
    # Tokens that were added to the model are numbered anew when it is read: the stranger stands beyond all of them.
    _add_unknown(spec["model"], max(core.get_vocab().values()) + len(spec["added_tokens"]) + 2)
    counting = tokenizers.Tokenizer.from_str(json.dumps(spec))
    ids = np.full(max(counting.get_vocab().values()) + 1, -1, np.int64)
    for token, there in counting.get_vocab().items():
        here = core.token_to_id(token)
        ids[there] = -1 if here is None else here
    return counting, counting.get_vocab()[_STRANGER], ids


def _packing_with(core: Any, unknown: int) -> Pack:
    """For a tokenizer that has an unknown token."""
    literal = core.id_to_token(unknown)

    def pack(texts: list[str]) -> Packed:
        rows = _rows(core, texts)
        return Packed(rows, _lost(core, unknown, literal, texts, rows))

    return pack


def sentencepiece_packing(core: Any) -> Pack:
    """The same for a sentencepiece processor, whose models always have an unknown token."""
    unknown = core.unk_id()

    def pack(texts: list[str]) -> Packed:
        rows: list[Ids] = [np.array(ids, np.uint32) for ids in core.encode(texts)]
        lost = [""] * len(texts)
        for k, ids in enumerate(rows):
            if (ids == unknown).any():
                pieces = zip(ids, core.encode_as_pieces(texts[k]), strict=True)  # an unknown piece is its own text
                lost[k] = "".join(piece.replace("▁", "") for i, piece in pieces if i == unknown)
        return Packed(rows, lost)

    return pack


def _rows(core: Any, texts: list[str]) -> list[Ids]:
    return [np.array(row.ids, np.uint32) for row in core.encode_batch_fast(texts, add_special_tokens=False)]


def says_everything(core: Any) -> bool:
    """Does the vocabulary have every byte of UTF-8, and does the tokenizer use them?"""
    if type(core.model).__name__ != "BPE":
        return False
    vocabulary = core.get_vocab(with_added_tokens=False)
    if core.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256) if byte not in _NO_UTF8):
        return True
    probe = "東"  # "æĿ±" where bytes are written as characters, whatever comes before and after
    normal = core.normalizer.normalize_str(probe) if core.normalizer else probe
    pieces = core.pre_tokenizer.pre_tokenize_str(normal) if core.pre_tokenizer else [(normal, (0, 1))]
    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - set(map(chr, _NO_UTF8))  # these spell themselves
    return "æĿ±" in "".join(piece for piece, _ in pieces) and all(byte in vocabulary for byte in alphabet)


def unknown_id(model: dict[str, Any]) -> int | None:
    """The id of the model's unknown token, where it has one."""
    if model["type"] == "Unigram":
        found: int | None = model.get("unk_id")
    else:
        found = model["vocab"].get(model.get("unk_token"))
    return found


def _add_unknown(model: dict[str, Any], free: int) -> None:
    """Give a model without an unknown token one, in place. `free` is an id that no token has."""
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        model["unk_id"] = len(vocabulary)
        vocabulary.append([_STRANGER, min((score for _, score in vocabulary), default=0.0)])
    else:
        vocabulary[_STRANGER] = free
        model["unk_token"] = _STRANGER


def _lost(core: Any, unknown: int, literal: str, texts: list[str], rows: list[Ids]) -> list[str]:
    """The characters of each text for which `unknown` stands, but where the text says `literal` itself."""
    lost = [""] * len(texts)
    doubtful = [k for k, ids in enumerate(rows) if (ids == unknown).any()]
    encodings = core.encode_batch([texts[k] for k in doubtful], add_special_tokens=False)
    for k, encoding in zip(doubtful, encodings, strict=True):
        spans = {span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown}
        parts = (texts[k][start:stop] for start, stop in sorted(spans))
        lost[k] = "".join(part for part in parts if part.strip() != literal)
    return lost


def _left_out(core: Any, text: str) -> Ids | None:
    """The ids of a text of which the library leaves out, or raises for, what it does not know: then None."""
    try:
        return np.array(core.encode(text, add_special_tokens=False).ids, np.uint32)
    except Exception:  # the library raises bare Exception
        return None
