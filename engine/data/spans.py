"""Texts as ids with the characters that each id stands for, where marks such as `<|im_end|>` are read as marks."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from .unknown import Ids, says_everything, unknown_id, with_unknown

Offsets = npt.NDArray[np.int64]


class Spanned(NamedTuple):
    """Ids (n,), each of the characters [start, stop); and what characters no known token stands for."""

    ids: Ids
    starts: Offsets
    stops: Offsets
    lost: str


Spans = Callable[[list[str]], list[Spanned]]


def byte_spans(texts: list[str]) -> list[Spanned]:
    """Of the tokenizer "byte", which has no marks: all bytes of a character have its span."""
    found = []
    for text in texts:
        ids = np.frombuffer(text.encode(), np.uint8)
        starts = np.cumsum((ids & 0xC0) != 0x80) - 1
        found.append(Spanned(ids, starts, starts + 1, ""))
    return found


def spanning(core: Any) -> Spans:
    """How a tokenizer of the `tokenizers` library does it. It has to be set up before; a copy of it, which reads marks
    as every new tokenizer does, is made when first used."""

    @cache
    def made() -> tuple[Any, int, Offsets | None, bool]:
        """What encodes, its unknown token, what its ids are in `core` if others, and whether it can say everything."""
        if says_everything(core):
            return tokenizers.Tokenizer.from_str(core.to_str()), -1, None, True
        spec = json.loads(core.to_str())
        own = unknown_id(spec["model"])
        if own is not None:
            return tokenizers.Tokenizer.from_str(core.to_str()), own, None, False
        return *with_unknown(core, spec), False  # it leaves out what it does not know, and miscounts what follows

    def spans(texts: list[str]) -> list[Spanned]:
        marked, unknown, numbers, everything = made()
        found = []
        for text, row in zip(texts, marked.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = np.array(row.ids, np.int64)
            starts, stops = np.array(row.offsets, np.int64).reshape(-1, 2).T
            lost = "" if everything else _lost(text, starts, stops, ids == unknown)
            if numbers is not None:
                known = ids != unknown
                ids, starts, stops = numbers[ids[known]], starts[known], stops[known]
            found.append(Spanned(ids.astype(np.uint32), starts, stops, lost))
        return found

    return spans


def _lost(text: str, starts: Offsets, stops: Offsets, unknown: npt.NDArray[np.bool_]) -> str:
    """The characters, but for white space, that lie in no token's span, or in that of an unknown one."""
    said = np.zeros(len(text) + 1, np.int64)
    np.add.at(said, starts[~unknown], 1)
    np.add.at(said, stops[~unknown], -1)
    silent = np.flatnonzero(said.cumsum()[:-1] == 0)
    return "".join(text[i] for i in silent if text[i].strip())
