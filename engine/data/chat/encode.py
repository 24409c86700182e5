"""Examples as token ids, each with whether it is trained."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from optimizers.contract import UsageError

from ..tokenizer import Tokenizer
from ..unknown import Ids
from .masks import Example


class Encoded(NamedTuple):
    """One example as ids (n,) and whether each is trained, bool (n,): the first never is, as nothing predicts it."""

    ids: Ids
    trained: npt.NDArray[np.bool_]
    lost: str
    """Characters that the tokenizer cannot say."""
    across: int
    """Tokens of which a part is trained text and a part is not."""


def encode(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[Encoded]:
    """The whole text of each example is encoded at once, so that ids are those that the text has anywhere else.

    A token is trained where any of its characters is: the model must write it to write them. Raises UsageError for a
    kind of tokenizer that has no marks.
    """
    if tokenizer.spans is None:
        raise UsageError(
            f"tokenizer {tokenizer.name}: a sentencepiece model has no marks for turns; expected a tokenizer.json: "
            "give the checkpoint's folder that holds one"
        )
    found = []
    for example, spanned in zip(examples, tokenizer.spans([example.text for example in examples]), strict=True):
        wanted = np.zeros(len(example.text) + 1, np.int64)  # wanted[i]: trained characters before i
        for start, stop in example.spans:
            wanted[start + 1 : stop + 1] = 1
        wanted = wanted.cumsum()
        count = wanted[spanned.stops] - wanted[spanned.starts]
        ids, trained = spanned.ids.astype(np.uint32), count > 0
        across = int((trained & (count < spanned.stops - spanned.starts)).sum())
        if not example.ended:
            ids, trained = np.append(ids, np.uint32(tokenizer.eos)), np.append(trained, True)
        trained[:1] = False
        found.append(Encoded(ids, trained, spanned.lost, across))
    return found
