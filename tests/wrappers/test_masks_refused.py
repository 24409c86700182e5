"""Masks that cannot be are refused with their name; layers are found under the names of wrapped models."""

import pytest
import torch
from helpers.masks import KEY, LR, everything
from torch import Tensor

from optimizers.contract import Group, Optimizer, UsageError
from optimizers.partition import partition
from optimizers.rules.galore import galore
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.traversal import (
    coordinates,
    layers,
    tensors,
    traversal,
)

MATRIX = {"layers.0.w": torch.zeros(8, 8), "layers.1.w": torch.zeros(8, 8), "b": torch.zeros(8)}


def low(params: dict[str, Tensor]) -> Optimizer:
    return partition(params, [Group("low", galore(2), ("layers",), LR), Group("rest", sgd(), ("",), LR)])


@pytest.mark.parametrize(("make_", "named_"), [
    (lambda: layers(MATRIX, r"blocks\.(\d+)\."), r"layer pattern .*blocks.* matches no parameter"),
    (lambda: layers(MATRIX, r"layers\.\d+\."), "expected one group of digits"),
    (lambda: layers(MATRIX, r"(layers)\."), "expected one group of digits"),
    (lambda: tensors(MATRIX, ("conv",)), "mask pattern 'conv' matches no parameter"),
    (lambda: coordinates(MATRIX, ("layers", "conv")), "mask pattern 'conv'"),
    (lambda: traversal(layers(MATRIX), KEY, active=3, period=1), "active: got 3 of 2 layers"),
    (lambda: traversal(layers(MATRIX), KEY, active=0, period=1), "active: got 0"),
    (lambda: traversal(layers(MATRIX), KEY, period=1), "give one of the two"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, keep=0.5, period=1), "give one of the two"),
    (lambda: traversal(tensors(MATRIX), KEY, keep=1.5, period=1), "keep: got 1.5"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, period=0), "period and mask_warmup: got 0"),
    (lambda: traversal(coordinates(MATRIX), KEY, active=1, period=1), "expected keep"),
    (lambda: traversal(layers(MATRIX), KEY, active=1, period=1, replacement=True, order="joint"), "replacement"),
    (lambda: traversal(tensors(MATRIX), KEY, keep=0.5, period=1, remainder="reset"), "Algorithm 2"),
    (lambda: omgd(everything(MATRIX, sgd()), MATRIX, traversal(layers(MATRIX), KEY, active=1, period=1, order="joint")),
     "got state_policy 'drop', expected 'keep'"),
    (lambda: omgd(low(MATRIX), MATRIX, traversal(coordinates(MATRIX, ("layers",)), KEY, keep=0.5, period=1)),
     "layers.0.w: masks of coordinates leave vectors, but galore needs a matrix"),
    (lambda: omgd(everything(MATRIX, muon()), MATRIX, traversal(coordinates(MATRIX, ("1",)), KEY, keep=0.5, period=1)),
     "layers.1.w .*muon needs a matrix"),
    (lambda: omgd(everything(MATRIX, sgd()), MATRIX, traversal(coordinates(MATRIX, ("b",)), KEY, keep=0.1, period=1)),
     "b: 8 entries cannot be split over 10 masks"),
])  # fmt: skip
def test_what_cannot_be_done_is_named(make_, named_):
    with pytest.raises(UsageError, match=named_):
        make_()


def test_names_of_wrapped_models_find_their_layers():
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        params = {f"{prefix}model.layers.{i}.w": torch.zeros(2) for i in (0, 2, 10)} | {f"{prefix}norm": torch.zeros(2)}
        found = layers(params, r"^model\.layers\.(\d+)\.")
        assert found.labels == ("model.layers.0", "model.layers.2", "model.layers.10")
        assert [own for (own,) in found.names] == [name for name in params if "layers" in name]
    inner = {f"encoder._orig_mod.layer.{i}.w": torch.zeros(2) for i in range(2)}
    assert layers(inner, r"^encoder\.layer\.(\d+)\.").labels == ("encoder.layer.0", "encoder.layer.1")
