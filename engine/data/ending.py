"""Which token ends a document: what the user says, then what the files beside the tokenizer say, then a list."""

import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizers.contract import UsageError

END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
TOKENIZER_CONFIG = "tokenizer_config.json"

# Files of a Hugging Face folder in the order in which they are believed, and the field that names the end.
_NAMES = ((TOKENIZER_CONFIG, "eos_token"), ("special_tokens_map.json", "eos_token"))
_IDS = (("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"))


@dataclass(frozen=True)
class Vocabulary:
    """What must be known of a tokenizer to choose its end token."""

    path: Path
    """The file it came from; what lies beside it is read."""
    find: Callable[[str], int | None]
    """A token's id."""
    token: Callable[[int], str | None]
    """An id's token; None where there is none."""
    special: Set[str]
    """Tokens that the tokenizer's own file marks as special."""
    own: int | None = None
    """The end token that the vocabulary file itself declares, as sentencepiece models do."""


def end_of(vocabulary: Vocabulary, asked: str | int | None = None) -> tuple[int, str]:
    """The id that ends documents, and a remark where the files disagree; the remark is empty where they do not.

    `asked` is a token or an id (a text that is both is a token). Raises UsageError where it is neither, where a file
    beside the tokenizer is damaged, and where nothing says which token it is.
    """
    if asked is not None:
        return _asked(vocabulary, asked), ""
    said = list(_said(vocabulary))
    known = [(token, where) for token, where in said if token is not None]
    if known:
        end = known[0][0]
        others = dict.fromkeys(
            f"{where} names {_shown(vocabulary, token)}" for token, where in known[1:] if token != end
        )
        strangers = dict.fromkeys(where for token, where in said if token is None)
        doubts = [*others, *(f"{where}, which the vocabulary does not have" for where in strangers)]
        if not doubts:
            return end, ""
        return (
            end,
            f"documents end with {_shown(vocabulary, end)}, by {known[0][1]}; {'; '.join(doubts)} (--eos chooses)",
        )
    if vocabulary.own is not None:
        return vocabulary.own, ""
    there = [name for name in END_OF_TEXT if vocabulary.find(name) is not None]
    found = [name for name in there if name in vocabulary.special] or there
    wrong = "".join(f"; {where}, which the vocabulary does not have" for _, where in said)
    if not found:
        special = f"its special tokens are {' '.join(sorted(vocabulary.special)[:12])}; " if vocabulary.special else ""
        raise UsageError(
            f"tokenizer {vocabulary.path}: no token to end documents with; add one of {' '.join(END_OF_TEXT)}, "
            f"or name one that it has with --eos ({special}nothing beside it names one{wrong})"
        )
    end = vocabulary.find(found[0]) or 0
    if len(found) == 1:
        return end, wrong.removeprefix("; ") and f"documents end with {found[0]!r}{wrong} (--eos chooses)"
    return end, (
        f"documents end with {found[0]!r}, the first of {' '.join(found)} in the vocabulary: no file beside "
        f"{vocabulary.path.name} says which{wrong} (--eos chooses)"
    )


def _asked(vocabulary: Vocabulary, asked: str | int) -> int:
    if isinstance(asked, str) and (found := vocabulary.find(asked)) is not None:
        return found
    if str(asked).isdecimal() and int(asked) < 1 << 31 and vocabulary.token(int(asked)) is not None:
        return int(asked)
    raise UsageError(f"--eos: got {asked!r}, expected a token or an id of the vocabulary of {vocabulary.path}")


def _said(vocabulary: Vocabulary) -> Iterator[tuple[int | None, str]]:
    """Every end token that a file beside the tokenizer names, and where; None where the vocabulary lacks it."""
    folder = vocabulary.path.parent
    for file, field in _NAMES:
        name = read_beside(folder, file).get(field)
        name = name.get("content") if isinstance(name, Mapping) else name
        if isinstance(name, str):
            found = vocabulary.find(name)
            yield found, file if found is not None else f"{file} names {name!r}"
    for file, field in _IDS:
        content = read_beside(folder, file)
        inner = content.get("text_config")  # of a model that reads more than text
        ids = content.get(field, inner.get(field) if isinstance(inner, Mapping) else None)
        several = [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
        for i in several:
            there = 0 <= i < 1 << 31 and vocabulary.token(i) is not None
            yield (i, file) if there else (None, f"{file} names {i}")


def read_beside(folder: Path, name: str) -> Mapping[str, Any]:
    """A JSON object beside a tokenizer; empty where there is no such file. Raises UsageError for a damaged one."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); repair or remove it, or name the end with --eos") from None
    return content if isinstance(content, Mapping) else {}


def _shown(vocabulary: Vocabulary, token: int) -> str:
    return f"{vocabulary.token(token)!r} ({token})"
