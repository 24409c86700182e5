"""The bench of updates: other libraries take part where they are installed, and it says where they are not."""

import importlib.util
import json
import sys
import types

import pytest
import torch
from helpers.models import llama
from torch import nn

from optimizers import torch_optim
from tools.bench import libraries, update


def bench(tmp_path, capsys, monkeypatch, **given):
    """Its rows by their side, on a small model and uncompiled, and what it printed."""
    file = tmp_path / "found.json"
    monkeypatch.setattr(update, "PRESETS", {"demo": llama(2).config})
    with torch.compiler.set_stance("force_eager"):
        update.bench_update(update.UpdateBench(model="demo", rank=4, rounds=1, json=file, **given))
    return {row["side"]: row for row in json.loads(file.read_text())["rows"]}, capsys.readouterr().out


@pytest.mark.run
def test_a_library_takes_part_where_it_is_installed(tmp_path, capsys, monkeypatch):
    """One that looks like pytorch_optimizer, and is torch's AdamW."""
    fake = types.ModuleType("pytorch_optimizer")
    fake.__spec__ = importlib.util.spec_from_loader("pytorch_optimizer", None)
    own = {"update_proj_gap", "scale", "projection_type", "rank", "sn", "use_muon"}
    asked = []

    class AdamW(torch.optim.AdamW):
        def __init__(self, params):
            params = list(params)
            asked.append({key for group in params if isinstance(group, dict) for key in group} & own)
            super().__init__(params)

    for name in ("AdamW", "GaLore", "AdamWSN", "Muon"):
        setattr(fake, name, AdamW)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", fake)
    there = importlib.util.find_spec
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "heavyball" else there(name))
    rows, said = bench(tmp_path, capsys, monkeypatch, against=("pytorch_optimizer", "heavyball"))
    assert asked == [set(), own - {"sn", "use_muon"}, {"sn"}, {"use_muon"}]
    assert "heavyball is not installed" in said and "pytorch_optimizer is not" not in said
    assert not any(side.startswith("heavyball") for side in rows)
    assert rows[update.BASE]["ratio"] == 1 and not any("torch AdamW(fused)" in side for side in rows)
    for side, like in (("pytorch_optimizer GaLore", "galore"), ("sumo, torch.optim", "sumo")):
        one, own = rows[side], rows[like]
        assert one["over ours"] == pytest.approx(one["CPU ms"] / own["CPU ms"]), "of a run of one round"
    muon = rows["pytorch_optimizer Muon, Linear weights only"]
    assert muon["over ours"] == pytest.approx(muon["CPU ms"] / rows["muon, Linear weights only"]["CPU ms"])
    assert rows["adamw"]["state MB"] == rows["adamw, torch.optim"]["state MB"]
    assert rows["pytorch_optimizer AdamW"]["state MB"] == pytest.approx(rows["adamw"]["state MB"], rel=1e-2), (
        "a clock is larger here"
    )


def test_torchs_own():
    named = {"a_proj.weight": nn.Parameter(torch.ones(4, 4))}
    grads = {"a_proj.weight": torch.ones(4, 4)}
    for other in libraries.others("torch", 2, update.linear):
        before = named["a_proj.weight"].detach().clone()
        optimizer = other.make(named)
        libraries.stepping(optimizer, named, grads)()
        assert not torch.equal(before, named["a_proj.weight"]), other.name
    assert libraries.held(torch_optim.AdamW(named.items())) == 2 * 16 * 4 + 4 + 16
