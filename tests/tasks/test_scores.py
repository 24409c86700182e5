"""Figures of a whole set: whatever the batches, they are those of all predictions at once, and the library's."""

import math

import pytest
import torch

from engine.task import Collected, Sums, Task, add
from engine.tasks import scores as module
from engine.tasks.scores import CLASSES, NUMBERS, scores
from models.segment import IGNORED
from optimizers.contract import UsageError


def over(names: tuple[str, ...], classes: int | None, predicted: torch.Tensor, targets: torch.Tensor, size: int):
    """The figures from sums over batches of `size`."""
    kind, total = scores(names, classes), Sums()
    for a, b in zip(predicted.split(size), targets.split(size), strict=True):
        add(total, kind.of(a, b))
    return kind.report({"loss": torch.ones(2), **total})


@pytest.mark.parametrize("classes", [2, 3])
def test_figures_of_classes_are_those_of_the_whole_set(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra `tasks`")
    draw = torch.Generator().manual_seed(classes)
    targets = torch.randint(classes, (101,), generator=draw)
    predicted = torch.where(torch.rand(101, generator=draw) < 0.6, targets, torch.zeros_like(targets))
    found = over(CLASSES, classes, predicted, targets, 7)
    a, b = targets.numpy(), predicted.numpy()
    expected = {
        "accuracy": metrics.accuracy_score(a, b),
        "f1": metrics.f1_score(a, b, average="binary" if classes == 2 else "macro"),
        "matthews": metrics.matthews_corrcoef(a, b),
    }
    assert found == pytest.approx(expected, rel=1e-9)
    whole = over(CLASSES, classes, torch.cat([predicted, predicted]), torch.cat([targets, targets * 0 + IGNORED]), 7)
    assert whole == pytest.approx(expected, rel=1e-9), "rows that count for nothing"


def test_figures_of_numbers_are_those_of_the_whole_set() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the extra `tasks`")
    draw = torch.Generator().manual_seed(0)
    targets = torch.randn(53, generator=draw).mul(4).round() / 4  # with ties
    predicted = targets + torch.randn(53, generator=draw)
    found = over(NUMBERS, None, torch.cat([predicted, predicted]), torch.cat([targets, targets * math.nan]), 5)
    a, b = predicted.double().numpy(), targets.double().numpy()
    expected = {"pearson": stats.pearsonr(a, b).statistic, "spearman": stats.spearmanr(a, b).statistic}
    assert found == pytest.approx(expected, rel=1e-9)
    assert math.isnan(over(("pearson",), None, torch.ones(4), targets[:4], 2)["pearson"])


def test_accuracy_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert over(("accuracy",), 3, torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), 3) == {"accuracy": 0.75}
    with pytest.raises(UsageError, match=r"metric f1: needs sklearn, .* 'leanstep\[tasks\]'"):
        scores(("f1",), 2)
    with pytest.raises(UsageError, match="metric: got 'pearson', expected some of accuracy, f1, matthews"):
        scores(("pearson",), 2)


def test_a_report_that_does_not_know_what_was_collected_says_so() -> None:
    sums = {"loss": torch.tensor([3.0, 2.0])}
    assert Task.report(None, sums) == {"loss": 1.5}
    for odd in (Collected(torch.ones(3, 2)), torch.ones(2, 2)):
        with pytest.raises(TypeError, match="table: got no pair"):
            Task.report(None, {**sums, "table": odd})
