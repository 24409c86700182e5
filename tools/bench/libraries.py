"""Optimizers of torch and of other libraries, as sides of a bench: each moves parameters that have a gradient."""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Library = Literal["torch", "pytorch_optimizer", "heavyball"]
Named = Mapping[str, Tensor]


class Other(NamedTuple):
    """An optimizer of a library: what to call it, our rule that does the same, and which weights it moves."""

    name: str
    like: str
    linear_only: bool
    make: Callable[[Named], torch.optim.Optimizer]


def missing(library: Library) -> str:
    """A line that says so where a library is not installed; else nothing."""
    return "" if find_spec(library) else f"{library} is not installed, so it has no row: pip install {library}"


def others(library: Library, rank: int, linear: Callable[[str], bool]) -> list[Other]:
    """What a library has that rules here do too, as far as it is written for whole models; rates are left as they are.

    `linear` says of a name whether it is the weight of a Linear layer.
    """
    if library == "torch":
        return _torch()
    return _pytorch_optimizer(rank, linear) if library == "pytorch_optimizer" else _heavyball()


def _torch() -> list[Other]:
    adamw, muon = torch.optim.AdamW, torch.optim.Muon
    return [
        Other("torch AdamW(foreach)", "adamw", False, lambda named: adamw(named.values(), foreach=True)),
        Other("torch AdamW(fused)", "adamw", False, lambda named: adamw(named.values(), fused=True)),
        Other("torch Muon", "muon", True, lambda named: muon(named.values(), adjust_lr_fn="match_rms_adamw")),
    ]


def _pytorch_optimizer(rank: int, linear: Callable[[str], bool]) -> list[Other]:
    import pytorch_optimizer as library

    keys = {"rank": rank, "update_proj_gap": 10**6, "scale": 0.25, "projection_type": "std"}

    def apart(named: Named, **own: Any) -> list[dict[str, Any]]:
        maps, rest = ([p for name, p in named.items() if linear(name) == wanted] for wanted in (True, False))
        return [{"params": maps, **own}, {"params": rest}]

    def muon(named: Named) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = library.Muon([{"params": list(named.values()), "use_muon": True}])
        return made

    return [
        Other("pytorch_optimizer AdamW", "adamw", False, lambda named: library.AdamW(named.values())),
        Other("pytorch_optimizer GaLore", "galore", False, lambda named: library.GaLore(apart(named, **keys))),
        Other("pytorch_optimizer AdamWSN", "adam_sn", False, lambda named: library.AdamWSN(apart(named, sn=True))),
        Other("pytorch_optimizer Muon", "muon", True, muon),
    ]


def _heavyball() -> list[Other]:
    import heavyball as library

    return [
        Other("heavyball AdamW", "adamw", False, lambda named: library.AdamW(named.values())),
        Other("heavyball Muon", "muon", True, lambda named: library.Muon(named.values())),
    ]


def stepping(optimizer: torch.optim.Optimizer, named: Named, grads: Named) -> Callable[[], object]:
    """One update, from these gradients, which some libraries take away."""

    def run() -> None:
        for name, p in named.items():
            p.grad = grads[name]
        optimizer.step()

    return run


def held(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's state."""
    return sum({id(t): t.nbytes for t in _tensors(optimizer.state.values())}.values())


def _tensors(kept: Any) -> Iterable[Tensor]:
    if isinstance(kept, Tensor):
        yield kept
    elif not isinstance(kept, str) and isinstance(kept, Iterable):
        for one in kept.values() if isinstance(kept, Mapping) else kept:
            yield from _tensors(one)
    elif hasattr(kept, "__dict__"):  # a projector
        yield from _tensors(vars(kept))
