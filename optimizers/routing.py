"""Which rule a parameter goes to where nobody says: matrices to the rule, what is no map between spaces to the rest.

Names are those of the model, as `named_parameters` gives them. What is a norm, an embedding or a head is read from the
kind of module where there is a model, and from the name elsewhere.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from .contract import UsageError

Place = Literal["rule", "norms", "rest"]

FSDP = "_fsdp_wrapped_module"
ADDED = re.compile(rf"(?:^|(?<=\.))(?:module|_orig_mod|{FSDP}|_checkpoint_wrapped_module)\.")
NORM = re.compile(r"norm|(?:^|[._])(?:ln|bn)(?:_\w+|\d*)\.", re.IGNORECASE)
EMBEDDING = re.compile(r"(?:^|[._])(?:\w*embed\w*|wte|wpe)(?:\.|$)", re.IGNORECASE)
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|score|classifier|qa_outputs)\.|^(?:head|output)\.")
LAYER = re.compile(r"^(.*?\.)?\d+\.")  # up to the first number: what the parameters of one block share
MAP = re.compile(r"(?:proj|dense|linear|attn|attention|mlp|fc\d*)(?:[._]\w+)*\.weight$")  # names that matrices have
LARGE = 2**16  # entries of a vector that no norm has

WHY = {
    "rule": "matrices",
    "norms": "norms and vectors, not decayed",
    "rest": "embeddings, head and convolutions: no map between spaces",
}


def bare(name: str) -> str:
    """The name that the model gives it: without what DDP, FSDP, checkpointing and torch.compile put before it."""
    return ADDED.sub("", name)


def block(name: str) -> str:
    """What parameters that are updated together share: their layer, or else their module."""
    found = LAYER.match(name)
    return found[0] if found else name.rpartition(".")[0]


def kinds(model: nn.Module) -> dict[int, Place]:
    """What is known of parameters, by identity, from the modules that hold them."""
    found: dict[int, Place] = {}
    for module in model.modules():
        rows = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        norm = "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False):
            if rows:
                found[id(p)] = "rest"
            elif norm:
                found.setdefault(id(p), "norms")
    head = getattr(model, "get_output_embeddings", lambda: None)()  # transformers' name for it
    if isinstance(head, nn.Module):
        found |= {id(p): "rest" for p in head.parameters() if p.ndim > 1}
    return found


def place(name: str, p: Tensor, known: Mapping[int, Place]) -> Place:
    """Where a parameter goes."""
    if p.ndim < 2 or NORM.search(name):
        return "norms"
    if id(p) in known:
        return known[id(p)]
    return "rest" if p.ndim > 3 or EMBEDDING.search(name) or HEAD.search(name) else "rule"


def chosen(name: str, p: Tensor, match: Sequence[str]) -> Place:
    """The same, where patterns say what is the rule's."""
    if any(re.search(pattern, name) for pattern in match):
        return "rule"
    return "norms" if p.ndim < 2 or NORM.search(name) else "rest"


def check_patterns(match: Sequence[str], names: Sequence[str]) -> None:
    """Raises UsageError for a pattern that is no regular expression or matches nothing."""
    for pattern in match:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError(f"match: {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise UsageError(f"match: {pattern!r} matches no parameter; the names look like {list(names)[:3]}")


def check_whole(name: str, p: Tensor) -> None:
    """Raises UsageError for what looks like a matrix that was flattened, or a shard."""
    flat = "flat_param" in name or not p.numel()
    weight = name.endswith("weight") and not NORM.search(name)
    if flat or (p.ndim == 1 and weight and (MAP.search(name) or EMBEDDING.search(name) or p.numel() >= LARGE)):
        raise UsageError(flattened(name, p, "a matrix"))
    check_sharded(name, p)


def check_pieces(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raises UsageError where FSDP1 keeps the names of parameters and gives pieces of them: then none is a matrix."""
    inside = [(name, p) for name, p in named if FSDP in name]
    if inside and all(p.ndim < 2 for _, p in inside):
        raise UsageError(flattened(*max(inside, key=lambda pair: pair[1].numel()), "a matrix, or another whole tensor"))


def check_sharded(name: str, p: Tensor) -> None:
    """Raises UsageError for a DTensor, as FSDP2 and tensor parallelism make them."""
    if hasattr(p, "placements") and hasattr(p, "device_mesh"):
        raise UsageError(
            f"{name}: got a DTensor, expected a whole tensor: sharded parameters are not supported; use DDP, or give "
            "each process whole parameters"
        )


def flattened(name: str, p: Tensor, expected: str) -> str:
    """The message for a parameter that has lost its shape."""
    return (
        f"{name}: got a tensor of shape {tuple(p.shape)}, expected {expected}: it looks flattened or sharded, as "
        "DeepSpeed's ZeRO and FSDP1 do it, and a rule for matrices would do something else to it without a word. Use "
        'DDP; or, where it is a vector indeed, give it in a group with "rule": "adamw"'
    )
