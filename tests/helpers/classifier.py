"""A small classifier with BatchNorm and dropout, trained by `fit`: `python tests/helpers/classifier.py OUT`."""

import csv
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import RunConfig
from engine.fit import Fit, fit
from engine.tasks.arrays import ArrayTask
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

FILE = Path(__file__).resolve().parents[1] / "data" / "breast_cancer_wdbc.csv"


def table() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(train, validation): "x" float32 (rows, 30), standardised, and "y" int64 (rows,); every fifth row is held out."""
    with FILE.open(encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    x = torch.tensor([[float(value) for value in row[2:]] for row in rows])
    y = torch.tensor([int(row[1] == "M") for row in rows])
    held_out = torch.arange(len(rows)) % 5 == 0
    x = (x - x[~held_out].mean(0)) / x[~held_out].std(0)
    return {"x": x[~held_out], "y": y[~held_out]}, {"x": x[held_out], "y": y[held_out]}


def classifier(seed: int = 0, plain: bool = False) -> nn.Module:
    """Two layers; without `plain`, BatchNorm and dropout between them."""
    torch.manual_seed(seed)
    between = [nn.ReLU()] if plain else [nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Linear(30, 32), *between, nn.Linear(32, 2))


def loss(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    return F.cross_entropy(module(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])


def metrics(module: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    return {"accuracy": ((module(batch["x"]).argmax(-1) == batch["y"]).sum(), len(batch["y"]))}


def task(model: nn.Module, **options: Any) -> ArrayTask:
    train, validation = table()
    return ArrayTask(model, loss, train=train, validation=validation, metrics=metrics, **options)


def run(out: Path, plain: bool = False, seed: int = 0, **settings: Any) -> Fit:
    model = classifier(plain=plain)
    optimizer = partition(dict(model.named_parameters()), [Group("adamw", adamw(), ("",), lr=3e-3)])
    settings = {"steps": 120, "micro_batch": 32, "compile": "off", **settings}
    return fit(task(model, seed=seed), optimizer, RunConfig(out=out, **settings))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), plain="plain" in sys.argv, resume="auto", steps=200, save_every=10, keep_last=3)
