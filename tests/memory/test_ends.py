"""Both ends of a run take no more memory than its middle: starting, resuming, taking over from another optimizer.

Counted allocations over what training holds all the time. The model has many small tensors, so that one of them is a
small part of the whole, as in a large model: what is asked for is that there is never a second copy of all.
"""

from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import form
from engine.memory import counted_peak
from recipes import train
from recipes.registry import parsed
from tools.bench.ends import OPTIMIZERS, SHAPE, Nothing, built, resumed, saved, started

pytestmark = pytest.mark.run  # each end of a run is built

FAST = ("rso, products",)  # of 12 seconds each, the one with state of every kind; the others are slow
MOST = 1.05  # the most that was measured is 1.033, a swap from AdamW to rmsprop_sn, which holds hardly any state


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of AdamW, by precision."""
    root = tmp_path_factory.mktemp("adamw")
    return {dtype: saved(f"baseline --precision {dtype}", root / dtype) for dtype in ("fp32", "bf16")}


@pytest.mark.run
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OPTIMIZERS]
)
def test_no_end_of_a_run_holds_a_second_copy(tmp_path, adamw, name):
    line = OPTIMIZERS[name]
    dtype = "bf16" if "--precision bf16" in line else "fp32"
    peak, held = started(line, tmp_path / "fresh")[1]
    assert peak <= MOST * held, "start"
    path = saved(line, tmp_path / "run")
    peak, held = resumed(line, path)
    assert peak <= MOST * held, "resume"
    peak, held = resumed(line, adamw[dtype], swap=True)
    assert peak <= MOST * held, "from AdamW"
    peak, held = resumed(f"baseline --precision {dtype}", path, swap=True)
    assert peak <= MOST * held, "to AdamW"


def test_a_resumed_state_is_the_saved_one_with_its_ties(tmp_path):
    line = "rso demo --rank 8 --form products --share"
    path, run = saved(line, tmp_path), built(line)
    trainer = run.trainer(Nothing(run.model), tmp_path, torch.device("cpu"), fresh=False)
    trainer.resume(checkpoint.read(path))
    whole, state = checkpoint.load(path), trainer.step.state
    assert list(state) == list(whole.state)
    for owner, slots in whole.state.items():
        assert all(state[owner][slot].equal(t) for slot, t in slots.items()), owner
    assert all(p.equal(whole.params[name]) for name, p in trainer.step.params.items())
    one, other = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert state[one]["P"] is state[other]["P"], "a P that layers share stays one tensor"


def test_what_cannot_fit_changes_nothing(tmp_path):
    path = saved("baseline", tmp_path)
    trainer, _ = started("snsm demo --rank 8", tmp_path / "other")
    state = {owner: dict(slots) for owner, slots in trainer.step.state.items()}
    params = {name: p.detach().clone() for name, p in trainer.step.params.items()}
    with pytest.raises(checkpoint.CheckpointError, match="convert it with --swap"):
        trainer.resume(checkpoint.read(path))
    assert all(p.equal(params[name]) for name, p in trainer.step.params.items())
    assert all(trainer.step.state[owner][slot] is t for owner, slots in state.items() for slot, t in slots.items())


def test_a_model_is_built_without_memory_and_so_is_its_receipt():
    def told() -> None:
        run = built("snsm demo --model 1b --rank 128 --precision bf16-sr", "--compile off")
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in run.params.values())
        assert all(t.is_meta for slots in run.optimizer.init(run.params).values() for t in slots.values())

    assert counted_peak(told) < 2**21, "tables of angles on the host, no more"


def test_every_file_of_a_checkpoint_is_hashed_once(tmp_path, monkeypatch):
    """To resume the newest checkpoint of a run: not once to find it, once to open it and once to read it."""
    path = saved("baseline", tmp_path)
    hashed: list[str] = []
    digest = form.digest
    for module in (form, checkpoint.reader, checkpoint.store):
        monkeypatch.setattr(module, "digest", lambda file: (hashed.append(file.name), digest(file))[1])
    from engine.loop.folder import place

    for resume, out in (("auto", tmp_path), (str(tmp_path), tmp_path), (str(path), tmp_path)):
        hashed.clear()
        config = train.dataclasses.replace(parsed(["baseline", *SHAPE.split()], "test"), resume=resume, out=out)
        with place(config, tmp_path) as (_, found):
            run = built("baseline")
            trainer = run.trainer(Nothing(run.model), tmp_path, torch.device("cpu"), fresh=False)
            trainer.resume(found)
        assert sorted(hashed) == ["config.json", "model.safetensors", "optimizer.safetensors"], resume
