"""Which documents are held out for validation: decided by what they say, never by where they stand.

Identical documents always fall on the same side, and neither the order nor the grouping of the files matters.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from optimizers.contract import UsageError

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")

LARGEST = 0.1  # a document that is more of the corpus than this (and than the fraction) is not held out whole


@dataclass(frozen=True)
class Split:
    """The documents held out, by digest; `cut` is the one that is cut in two, at character `at`, if there is one."""

    held: frozenset[int]
    cut: int = -1
    at: int = 0
    note: str = ""
    """What was held out, in words."""

    def parts(self, text: str) -> Iterator[tuple[Side, str]]:
        """A document as what training and validation get of it."""
        key = digest(text)
        if key == self.cut:
            yield "train", text[: self.at]
            yield "validation", text[self.at :]
        else:
            yield ("validation" if key in self.held else "train"), text


def digest(text: str) -> int:
    """64 bits that stand for a document's content."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hold_out(texts: Callable[[], Iterable[str]], fraction: float) -> Split:
    """Hold out about `fraction` of the characters: documents in the order of their digests, at least one.

    Where no document is small enough to be spared (a corpus of one document, or of a few), the end of the longest is
    held out instead. `texts()` is read once, and once more in that case; 16 bytes a document are kept meanwhile. Raises
    UsageError for a fraction that is no fraction and for a corpus too short to be divided.
    """
    if not 0 < fraction <= 0.5:
        raise UsageError(f"validation_fraction: got {fraction}; expected more than 0 and at most 0.5")
    keys, sizes = array("Q"), array("Q")
    for text in texts():
        keys.append(digest(text))
        sizes.append(len(text))
    if not keys:
        raise UsageError("the data has no document with text; expected some to train on and some to hold out")
    unique, inverse, copies = np.unique(np.frombuffer(keys, np.uint64), return_inverse=True, return_counts=True)
    weights = np.bincount(inverse, weights=np.frombuffer(sizes, np.uint64))  # characters, all copies together
    total = weights.sum()
    small = np.flatnonzero(weights <= max(fraction, LARGEST) * total)
    if len(small):
        shares = weights[small].cumsum() / total
        spared = max(int(np.searchsorted(shares, fraction, side="right")), 1)
        count, share = copies[small[:spared]].sum(), shares[spared - 1]
        note = f"{count:,} of {len(keys):,} documents, {share:.2%} of the characters, chosen by a hash of their content"
        return Split(frozenset(unique[small[:spared]].tolist()), note=note)
    longest = int((weights / copies).argmax())
    text = next((text for text in texts() if digest(text) == unique[longest]), "")
    if not text:
        raise UsageError("the data changed while it was read; start again once nothing writes to it")
    at = _before_the_end(text, min(fraction * total / copies[longest], len(text) / 2))
    note = f"the last {len(text) - at:,} characters of the longest document; none is small enough to be held out whole"
    return Split(frozenset(), int(unique[longest]), at, note)


def _before_the_end(text: str, length: float) -> int:
    """Where the last `length` characters begin, moved back to the start of a line if one is near."""
    if len(text) < 2:
        raise UsageError("the data has documents of one character only; expected text to train on and some to hold out")
    at = min(max(int(len(text) - length), 1), len(text) - 1)
    line = text.rfind("\n", 1, at) + 1
    return line if line and at - line < len(text) - at else at
