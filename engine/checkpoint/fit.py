"""Copying a checkpoint's tensors into a model, after all names, shapes and dtypes were compared."""

import torch

from optimizers.contract import Params

from .tensorfile import CheckpointError, ties


def restore_into(params: Params, loaded: Params) -> None:
    """Copy `loaded` into `params` in place, after checking that names, shapes and dtypes agree.

    Either side may name a tied weight once or several times. Raises CheckpointError, having copied nothing.
    """
    for name, p in check_fit(params, loaded).items():
        p.detach().copy_(loaded[name])


def check_fit(params: Params, loaded: Params) -> Params:
    """Raises CheckpointError unless `restore_into` can copy; returns those of `params` that it would copy to."""
    missing, unexpected = _unmatched(params, loaded), _unmatched(loaded, params)
    if missing or unexpected:
        raise CheckpointError(
            f"names differ: the checkpoint lacks {_few(missing)} and has unexpected {_few(unexpected)}; "
            "build the model with the checkpoint's config.json"
        )
    common = {name: p for name, p in params.items() if name in loaded}
    for name, p in common.items():
        got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (loaded[name], p))
        if got != expected:
            raise CheckpointError(f"{name}: the checkpoint has {got}, expected {expected}; build the model like it")
    for name, first in ties(common).items():
        if loaded[name] is not loaded[first] and not torch.equal(loaded[name], loaded[first]):
            raise CheckpointError(f"{name}: tied to {first} in the model, but the checkpoint has different values")
    return common


def _unmatched(wanted: Params, there: Params) -> list[str]:
    """Names in `wanted` that are not in `there`, nor tied to one that is."""
    tied = ties(wanted)
    have = {tied[name] for name in wanted if name in there}
    return [name for name in wanted if tied[name] not in have]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{names[:8]}{more}" if names else "nothing"
