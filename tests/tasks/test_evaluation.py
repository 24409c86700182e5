"""An evaluation asks the device once, at its end, whatever it counts."""

import pytest
import torch
from helpers.waits import waits
from torch import Tensor

from engine.loop.evaluation import evaluate, on_host
from engine.task import Collected
from engine.tasks.scores import scores
from models.segment import IGNORED
from tests.support import Combination, step_of


class Held:
    """Held-out rows of a language model, and what their evaluation reads."""

    def evaluation(self, count: int):
        for i in range(3):
            ids = torch.randint(0, 32, (count, 9), generator=torch.Generator().manual_seed(i))
            yield {"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}

    def evaluate(self, chain, params, batch) -> dict[str, Tensor]:
        loss, count = chain.loss(dict(params), batch)
        return {"loss": torch.stack([loss.double(), count.double()])}

    def report(self, sums) -> dict[str, float]:
        return {name: float(total[0] / total[1]) for name, total in sums.items()}


def test_one_read(monkeypatch):
    step, task = step_of(Combination("adamw", "none"), seed=0), Held()
    batches = list(task.evaluation(2))
    monkeypatch.setattr(task, "evaluation", lambda count: iter(batches), raising=False)
    with waits(monkeypatch) as found:
        evaluate(task, step, 2)
    assert found == {"cpu": 1, "_local_scalar_dense": 1}, "one copy, and on the host what is made of it"


def test_sums_arrive_as_they_were():
    sums = {
        "loss": torch.tensor([3.0, 2.0]),
        "table": torch.arange(4.0).view(2, 2),
        "pairs": Collected(torch.ones(3, 2)),
    }
    got = on_host(sums)
    assert list(got) == list(sums) and got["pairs"].rows.equal(torch.ones(3, 2).double())
    assert all(got[name].equal(sums[name].double()) for name in ("loss", "table"))


@pytest.mark.parametrize("classes", [3, None])
def test_scores_of_a_batch_wait_for_nothing(classes, monkeypatch):
    kind = scores(("accuracy",), 3) if classes else scores(("pearson",), None)
    predicted, targets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, IGNORED, 1])
    if classes is None:
        predicted, targets = predicted.float(), torch.tensor([0.0, 1.0, torch.nan, 1.0])
    with waits(monkeypatch) as found:
        kind.of(predicted, targets)
    assert not found
