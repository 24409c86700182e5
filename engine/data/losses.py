"""The characters of a corpus that its tokenizer cannot represent: counted, reported, and refused above a share."""

from collections.abc import Mapping, Sequence
from typing import Any

from optimizers.contract import UsageError

from .text import Passed
from .unknown import Packed

# Characters that cannot be said; documents that hold some, and that are nothing else or encode to no token at all; the
# first place; some of the characters. As it stands in the index of a prepared folder.
NOTHING_UNKNOWN: Mapping[str, Any] = {"characters": 0, "documents": 0, "left_out": 0, "first": "", "some": ""}


def counted(so_far: Mapping[str, Any], packed: Packed, places: Sequence[str]) -> dict[str, Any]:
    """`so_far` and what `packed` lost, whose documents stand at `places`."""
    now = dict(so_far)
    for ids, lost, place in zip(packed.ids, packed.lost, places, strict=True):
        now["characters"] += len(lost)
        now["documents"] += bool(lost)
        now["left_out"] += not len(ids)
        if lost:
            now["first"] = now["first"] or place
            if len(now["some"]) < 10:
                now["some"] = "".join(dict.fromkeys(now["some"] + ("".join(lost.split()) or lost)))[:10]
    return now


def several(count: int, thing: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def refuse_malformed(passed: Passed, field: str, allowed: float) -> None:
    """Raises UsageError where more than the share `allowed` of the rows are malformed."""
    if passed.malformed > allowed * passed.rows:
        raise UsageError(f"{passed.in_words(field)}; allowed are {allowed:.2%}: repair them, or use --allow-malformed")


def in_words(unknown: Mapping[str, Any], characters: int) -> str:
    """One line; empty where everything was said."""
    parts = []
    if unknown["characters"]:
        parts.append(
            f"{unknown['characters']:,} of {characters:,} characters ({unknown['characters'] / characters:.2%}), in "
            f"{several(unknown['documents'], 'document')}, are unknown to the tokenizer, such as "
            f"{unknown['some']!r}; the first in {unknown['first']}"
        )
    if unknown["left_out"]:
        parts.append(f"{several(unknown['left_out'], 'document')} left out, as no token comes of it")
    return "; ".join(parts)


def refuse_unknown(unknown: Mapping[str, Any], characters: int, allowed: float) -> None:
    """Raises UsageError where more of the text than the share `allowed` cannot be said."""
    if unknown["characters"] > allowed * characters:
        raise UsageError(
            f"{in_words(unknown, characters)}; allowed are {allowed:.2%}: give a tokenizer that knows them, such "
            "as 'byte' or one made by --train-bpe, or a larger --allow-unknown"
        )
