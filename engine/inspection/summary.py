"""A whole model, in numbers for a curve."""

import math
from collections.abc import Iterable, Mapping

import torch

from optimizers.contract import Group, Params, State

from ..checkpoint.rules import described
from .measures import Look, look

COUNTS = ("elements", "active", "parked", "tensors", "active_tensors", "parked_tensors")


def counts(looks: Iterable[Look]) -> dict[str, dict[str, int]]:
    """By rule: elements in all, trained now, parked; and the number of tensors in each of the three."""
    found: dict[str, dict[str, int]] = {}
    for one in looks:
        own = found.setdefault(one.who.rule, dict.fromkeys(COUNTS, 0))
        size = math.prod(one.shape)
        parked = one.status == "parked"
        for key, amount in zip(
            COUNTS, (size, one.active, size * parked, 1, one.status == "active", parked), strict=True
        ):
            own[key] += amount
    return found


def summary(looks: Iterable[Look]) -> dict[str, float]:
    """`<rule>/<measure>`: the mean over the rule's parameters (the largest basis error), and the active share of its
    elements. What is NaN for one parameter is left out."""
    looks = list(looks)
    gathered: dict[str, list[float]] = {}
    for one in looks:
        for measure, value in one.measures.items():
            if not math.isnan(value):
                gathered.setdefault(f"{one.who.rule}/{measure}", []).append(value)
    scalars = {
        name: max(values) if name.endswith("/basis_error") else sum(values) / len(values)
        for name, values in gathered.items()
    }
    for rule, elements in counts(looks).items():
        scalars[f"{rule}/active_share"] = elements["active"] / max(elements["elements"], 1)
    return scalars


@torch.no_grad()
def scalars(params: Params, state: State, owner: Mapping[str, Group], factor: float, rounded: bool) -> dict[str, float]:
    """`summary` of a model in training, as `optim/<rule>/<measure>`, a parameter at a time."""
    looks = []
    for name, p in params.items():
        if name not in owner:  # frozen
            continue
        looks.append(look(name, p, state.get(name), described(owner[name], factor), rounded)._replace(spectra={}))
    return {f"optim/{name.replace(' ', '-')}": value for name, value in summary(looks).items()}
