"""Recipes that count in passes over the data, and take the settings of a paper under the flags that are given."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimizers.contract import UsageError

from . import flags
from .config import TrainConfig

COUNTS = (("epochs", "steps"), ("eval-epochs", "eval-every"))  # two ways to say the same


@dataclass(frozen=True, kw_only=True)
class EpochConfig(TrainConfig):
    """A run in epochs: a class below it has the flags `epochs` and `eval_epochs`; 0 means that steps are counted."""

    def settled(self, epoch: int) -> Any:
        """The same, with the steps that --epochs and --eval-epochs are."""
        found: Any = self
        steps = max(round(found.epochs * epoch), 1) if found.epochs else self.steps
        every = max(round(found.eval_epochs * epoch), 1) if found.eval_epochs else self.eval_every
        return dataclasses.replace(self, steps=steps, eval_every=every)

    def check(self) -> None:
        super().check()
        for name in ("epochs", "eval_epochs"):
            if not 0 <= getattr(self, name) < 1e6:
                raise UsageError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected a number above 0")

    def asked_of_paper(self, given: Mapping[str, str]) -> Mapping[str, Any]:
        """The fields that a paper has for what the flags `given` name; none where they ask for no paper's. Raises
        UsageError."""
        return {}


def counted_in_steps(given: Mapping[str, str], counts: Sequence[tuple[str, str]] = COUNTS) -> dict[str, Any]:
    """The fields in epochs that count for nothing, as the flags `given` say steps. Raises UsageError for both, and for
    no epochs: 0 in the field means that steps are counted, which nobody asks for by typing it."""
    for epochs, steps in counts:
        if {f"--{epochs}", f"--{steps}"} <= given.keys():
            raise UsageError(f"--{epochs} and --{steps} say the same; give one of them")
        if _is_zero(given.get(f"--{epochs}", "")):
            raise UsageError(f"--{epochs}: got 0, expected a number above 0; --{steps} counts in steps")
    return {epochs.replace("-", "_"): 0.0 for epochs, steps in counts if f"--{steps}" in given}


def _is_zero(word: str) -> bool:
    try:
        return float(word) == 0
    except ValueError:  # the parser says what is wrong with it
        return False


def commands(presets: Mapping[str, tuple[str, Any]], args: Sequence[str] | None) -> Mapping[str, tuple[str, Any]]:
    """A recipe's presets; the one that the command line names, if it counts in epochs, begins as its flags ask for it.
    Raises UsageError."""
    words = flags.typed(args)
    said, config = presets.get(words[0], ("", None)) if words else ("", None)
    if not isinstance(config, EpochConfig):
        return presets
    given = flags.values(words[1:])
    begun = dataclasses.replace(config, **{**config.asked_of_paper(given), **counted_in_steps(given)})
    return {**presets, words[0]: (said, begun)}
