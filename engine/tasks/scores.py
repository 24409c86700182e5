"""Figures over a whole set of predictions, not means of batches' figures: accuracy, F1, Matthews, Pearson, Spearman.

    task.scores = scores(("accuracy", "matthews"), classes=2)        raises UsageError for a name that there is not
    task.scores.of(predicted, targets)                               of a batch: what adds over batches
    task.scores.report(sums)                                         of all batches: the figures by name

Of classes a table is counted, (targets, predictions); of numbers both are collected, as ranks do not add. Accuracy is
counted here; the others are scikit-learn's and SciPy's, of the extra `tasks`. A figure that is not defined, as that of
constant predictions, is nan.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from models.segment import IGNORED
from optimizers.contract import UsageError

from ..task import Collected, Sum, Sums

CLASSES = ("accuracy", "f1", "matthews")  # of predicted classes
NUMBERS = ("pearson", "spearman")  # of predicted numbers
PACKAGES = {"f1": "sklearn", "matthews": "sklearn", "pearson": "scipy", "spearman": "scipy"}
TABLE, PAIRS = "table", "pairs"  # names of sums


class Scores(Protocol):
    """What a task reports beside its loss."""

    def of(self, predicted: Tensor, targets: Tensor) -> Sums:
        """The sums of a batch: (n,) both; rows whose target is IGNORED (nan, of numbers) count for nothing."""

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        """The figures, from sums over all batches. Those of other names are passed over."""


class ClassScores:
    """Figures of predicted classes, int64 below `classes`. F1 is that of class 1, or with more than two classes the
    mean of all classes' F1."""

    def __init__(self, names: Sequence[str], classes: int) -> None:
        """Raises UsageError for a name that is none of `CLASSES`, or whose library is not there."""
        _check(names, CLASSES)
        self.names, self.classes = tuple(names), classes

    def of(self, predicted: Tensor, targets: Tensor) -> Sums:
        cells = torch.where(targets != IGNORED, targets * self.classes + predicted, self.classes**2)
        counts = torch.zeros(self.classes**2 + 1, dtype=torch.float64, device=cells.device)
        counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))  # bincount would ask for the largest
        return {TABLE: counts[:-1].view(self.classes, self.classes)}

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        table = sums[TABLE]
        assert isinstance(table, Tensor)
        table = table.cpu()
        return {name: self._figure(name, table) for name in self.names}

    def _figure(self, name: str, table: Tensor) -> float:
        if not float(table.sum()):
            return math.nan
        if name == "accuracy":
            return float(table.diagonal().sum() / table.sum())
        metrics: Any = import_module("sklearn.metrics")
        targets, predicted = (
            axis.flatten().numpy() for axis in torch.meshgrid(*[torch.arange(len(table))] * 2, indexing="ij")
        )
        given = {"sample_weight": table.flatten().numpy()}
        if name == "matthews":
            return float(metrics.matthews_corrcoef(targets, predicted, **given))
        average = "binary" if self.classes == 2 else "macro"
        return float(metrics.f1_score(targets, predicted, average=average, zero_division=0.0, **given))


class NumberScores:
    """Figures of predicted numbers."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UsageError for a name that is none of `NUMBERS`, or whose library is not there."""
        _check(names, NUMBERS)
        self.names = tuple(names)

    def of(self, predicted: Tensor, targets: Tensor) -> Sums:
        return {PAIRS: Collected(torch.stack([predicted.double(), targets.double()], 1))}

    def report(self, sums: Mapping[str, Sum]) -> dict[str, float]:
        pairs = sums[PAIRS]
        assert isinstance(pairs, Collected)
        rows = pairs.rows.cpu()
        rows = rows[~rows[:, 1].isnan()]
        return {name: _correlation(name, rows) for name in self.names}


def scores(names: Sequence[str], classes: int | None) -> Scores:
    """Those of a task with so many classes, or, with None, of numbers. Raises UsageError."""
    return NumberScores(names) if classes is None else ClassScores(names, classes)


def _correlation(name: str, pairs: Tensor) -> float:
    if len(pairs) < 2:
        return math.nan
    stats: Any = import_module("scipy.stats")
    with warnings.catch_warnings():  # of a constant, which correlates with nothing
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = (stats.pearsonr if name == "pearson" else stats.spearmanr)(*pairs.T.numpy())
    return float(found.statistic)


def _check(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"metric: got {name!r}, expected some of {', '.join(known)}")
        package = PACKAGES.get(name)
        if package and find_spec(package) is None:
            raise UsageError(f"metric {name}: needs {package}, which is not installed: pip install 'leanstep[tasks]'")
