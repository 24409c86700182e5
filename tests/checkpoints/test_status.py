"""Slots that are parked: what a checkpoint says of them, and what it said before."""

import json

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import CheckpointError, store
from engine.checkpoint.saver import Saver
from optimizers.state import Parked, parked_by

BY = {1: False, 2: True}
PARAMS = {name: torch.ones(2) for name in "abc"}


def state() -> dict[str, dict[str, torch.Tensor]]:
    return {"a": {"m": torch.zeros(2)}, "b": Parked({"m": torch.ones(2)}, BY), "c": Parked({}, {1: False})}


@pytest.mark.parametrize("background", [False, True])
def test_what_is_parked_and_by_what_comes_back(tmp_path, background):
    saver = Saver(tmp_path, 1, 0, background)
    saver.save(3, PARAMS, state(), {}, {}, {})
    assert saver.wait() is None
    path = checkpoint.latest(tmp_path).path
    for found in (checkpoint.load(path).state, {n: checkpoint.read(path).slots(n) for n in "abc"}):
        assert {n: dict(parked_by(slots)) for n, slots in found.items()} == {"a": {}, "b": BY, "c": {1: False}}
        assert torch.equal(found["b"]["m"], torch.ones(2)) and not found["c"]


@pytest.mark.parametrize(("policy", "host"), [("keep", False), ("offload", True)])
def test_a_checkpoint_that_says_it_in_its_keys_is_read(tmp_path, policy, host):
    """As version 1.0 wrote them."""
    old = {"a": {"m": torch.zeros(2)}, "parked:b": {"m": torch.ones(2)}}
    saved = checkpoint.read(checkpoint.save(tmp_path, 3, PARAMS, old, {}, {}, {"state_policy": policy}))
    assert list(saved.owners) == ["a", "b"] and dict(saved.parked) == {"b": {1: host}}
    assert torch.equal(saved.slots("b")["m"], torch.ones(2)) and parked_by(saved.slots("b")) == {1: host}


@pytest.mark.parametrize("said", [{"z": {"1": True}}, {"b": {}}, {"b": {"x": True}}, {"b": {"1": 1}}, {"b": [1]}, [1]])
def test_a_head_that_makes_no_sense_is_refused(tmp_path, said, monkeypatch):
    head = {"owners": json.dumps(["a", "b", "c"]), "parked": json.dumps(said)}
    monkeypatch.setattr(store, "write_status", lambda state: head)
    path = checkpoint.save(tmp_path, 3, PARAMS, state(), {}, {})
    with pytest.raises(CheckpointError, match="optimizer.safetensors: damaged, .*parked"):
        checkpoint.read(path)
