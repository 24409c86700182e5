"""The kinds of masks that `omgd` takes, and where one of them stands."""

import json
from collections.abc import Mapping
from typing import Any

from ..contract import Params, Slots
from . import norms, traversal

Choice = traversal.Traversal | norms.NormMasks
STATE = "traversal_state"  # in an optimizer's metadata: the key that its masks' own slots have in the state
TURN_WARMUP = "turn_warmup"  # and over how many steps of a turn the learning rate rises, where it does


def owned_keys(metadata: Mapping[str, str]) -> list[str]:
    """The keys of the state that belong to masks, not to a parameter."""
    return [value for key, value in metadata.items() if key.rpartition("over.")[2] == STATE]


def describe(metadata: Mapping[str, str], params: Params, step: int, state: Mapping[str, Slots]) -> dict[str, Any]:
    """Where the outermost masks are after `step` steps, as JSON: see `traversal.describe` and `norms.describe`.

    `metadata` is an optimizer's, or the head of a checkpoint; `state` is asked for what belongs to the masks.
    """
    if STATE not in metadata:
        return traversal.describe(metadata, params, step)
    return norms.describe(json.loads(metadata["traversal"]), params, step, state[metadata[STATE]])
