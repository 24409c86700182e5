"""Every registered rule as a `torch.optim.Optimizer`, for loops that are there already.

    from optimizers import torch_optim

    opt = torch_optim.SUMO(model.named_parameters(), lr=2e-3, rank=64)      any rule by its name, in any case
    opt = torch_optim.optimizer("sumo")(model, lr=2e-3, rank=64)            the same
    print(opt.receipt())                                                    who trains what

It moves tensors by the engine's kernel, compiled or not: there is no second implementation, and a rule that is added to
the registry is here too. What it does not have is the engine's order: all gradients exist before `step`, unless
`in_backward` says otherwise, and activations are the loop's.

    state        opt.state[p] = {slot: tensor}, made with the optimizer; saved with state_dict(), dtypes as they are
    clock        group["count"], the steps that were taken; every draw is a function of it, the seed and a name
    settings     group["rule"], group["options"]; lr and weight_decay are read from the group at every step
"""

import dataclasses
from typing import Any, ClassVar

from .contract import UsageError
from .groups import Given
from .registry import RULES
from .rule_optimizer import RuleOptimizer


def optimizer(name: str) -> type[RuleOptimizer]:
    """The class of a registered rule. Raises UsageError for a name that nobody knows."""
    if name not in RULES:
        raise UsageError(f"optimizer {name!r} is not known; give one of {', '.join(RULES)}")
    family = RULES[name]
    if name not in _CLASSES or _CLASSES[name].family is not family:
        options = dataclasses.fields(family.options)
        said = ", ".join(f"{field.name}={family.preset.get(field.name, field.default)!r}" for field in options)
        doc = f"{RuleOptimizer.__init__.__doc__}\n\nOptions of {name}, by name: {said}."
        body = {"family": family, "__doc__": doc, "__module__": __name__}
        _CLASSES[name] = type(_title(name), (RuleOptimizer,), body)
    return _CLASSES[name]


_CLASSES: dict[str, type[RuleOptimizer]] = {}


class Factory:
    """For hosts that make an instance first and then call it with the model, such as Transformers 5's Trainer:
    `optimizer_cls_and_kwargs=(torch_optim.factory("sumo"), {"lr": 2e-3, "rank": 64})`."""

    name: ClassVar[str]

    def __call__(self, model: Given, **options: Any) -> RuleOptimizer:
        """The optimizer of that model; `options` as `RuleOptimizer` takes them."""
        return optimizer(self.name)(model, **options)


def factory(name: str) -> type[Factory]:
    """The factory class of a registered rule. Raises UsageError as `optimizer` does."""
    return type(f"{optimizer(name).__name__}Factory", (Factory,), {"name": name})


def __getattr__(name: str) -> type[RuleOptimizer]:
    """A class by its rule's name without underscores, in any case that begins with a capital: SUMO, AdamW, AdamSNSM."""
    if name[:1].isupper():
        for known in RULES:
            if known.replace("_", "") == name.lower():
                return optimizer(known)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(map(_title, RULES))}")


def __dir__() -> list[str]:
    return [*globals(), *map(_title, RULES)]


def _title(name: str) -> str:
    """Under which name a class calls itself: as its options do, or the words of the rule."""
    own: str = RULES[name].options.__name__
    return own if own.lower() == name else "".join(word.capitalize() for word in name.split("_"))
