"""A checkpoint that is read is hashed once, whichever command reads it, and what is read are the model's weights."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.classifier import run as fitted
from helpers.runs import TINY, corpus, here, tool
from safetensors.torch import load_file

from engine import checkpoint
from engine.checkpoint import reader
from engine.inspection.matrices import rms
from optimizers.wrappers.rso import merge
from tools import generate
from tools import inspect as inspecting
from tools.generate import find, load_model
from tools.inspect import inspect

FILES = ("model.safetensors", "config.json", "optimizer.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with a checkpoint at steps 2 and 4: AdamW's, and RSO's in products."""
    folder = corpus(tmp_path_factory.mktemp("hashed"))
    for name, recipe in (("adamw", "baseline"), ("rso", "rso demo --rank 4 --period 7 --form products --lr 1e-2")):
        done = here(folder, f"{recipe} {TINY} --steps 4 --save-every 2 --eval-every 4 --warmup 0 --out {name}")
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file was hashed to be read."""
    found: Counter[Path] = Counter()
    digest = reader.digest

    def counted(file: Path) -> str:
        found[file.resolve()] += 1
        return digest(file)

    monkeypatch.setattr(reader, "digest", counted)
    return found


def once(*folders: Path) -> dict[Path, int]:
    weights = [path / checkpoint.WEIGHTS for path in folders if (path / checkpoint.WEIGHTS).exists()]
    return {file.resolve(): 1 for file in (*(path / name for path in folders for name in FILES), *weights)}


@pytest.mark.run
@pytest.mark.parametrize("source", ["adamw", "adamw/step-00000002", "rso"])
def test_a_swap_hashes_its_source_once(folder, hashed, tmp_path, source):
    done = tool(folder, f'tools.swap {source} {tmp_path / "new"} --to "snsm demo --rank 4"')
    assert done.code == 0, done.err
    assert hashed == once(folder / source if "step-" in source else folder / source / "step-00000004")


@pytest.mark.run
def test_a_swap_into_a_run_is_refused_before_anything_is_hashed(folder, hashed):
    done = tool(folder, 'tools.swap adamw rso --to "snsm demo --rank 4"')
    assert done.code == 2 and "rso holds a run already" in done.err
    assert not hashed


@pytest.mark.run
@pytest.mark.parametrize(
    ("main", "line", "read"),
    [
        (inspecting.main, "adamw", ["adamw/step-00000004"]),
        (inspecting.main, "rso/step-00000002", ["rso/step-00000002"]),
        (inspecting.main, "rso --compare rso/step-00000002", ["rso/step-00000004", "rso/step-00000002"]),
        (inspecting.main, "adamw --compare rso", ["adamw/step-00000004", "rso/step-00000004"]),
        (generate.main, "adamw --prompt a --max-new-tokens 1", ["adamw/step-00000004"]),
        (generate.main, "rso --prompt a --max-new-tokens 1", ["rso/step-00000004"]),
    ],
)
def test_a_tool_hashes_what_it_reads_once(folder, hashed, monkeypatch, capsys, main, line, read):
    monkeypatch.chdir(folder)
    assert main(line.split()) == 0, capsys.readouterr().err
    assert hashed == once(*(folder / path for path in read))


@pytest.mark.run
@pytest.mark.parametrize("resume", ["auto", "{out}", "{out}/step-00000004"])
def test_fit_hashes_what_it_resumes_once(hashed, tmp_path, resume):
    fitted(tmp_path / "run", steps=4)
    assert not hashed
    done = fitted(tmp_path / "run", steps=6, resume=resume.format(out=tmp_path / "run"))
    assert done.steps == 6 and hashed == once(tmp_path / "run" / "step-00000004")


@pytest.mark.run
def test_the_product_of_an_older_checkpoint_is_merged_and_hashed_once(folder, hashed, tmp_path):
    """One whose model.safetensors has W, and whose state alone says that B Pᵀ belongs to it."""
    new = folder / "rso" / "step-00000004"
    saved = checkpoint.load(new)
    checkpoint.save(tmp_path, 4, saved.params, saved.state, saved.trainer, saved.model_config, saved.header)
    hashed.clear()
    found = find(tmp_path, None)
    model = load_model(found.path, torch.device("cpu"), found.record)
    assert hashed == once(tmp_path / "step-00000004")
    expected = load_file(new / checkpoint.MODEL)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters() if name in expected)
    before, after = (inspect(path).looks for path in (tmp_path, new))
    assert [look.measures for look in before] == [look.measures for look in after]


@pytest.mark.run
def test_inspect_measures_the_weights_that_the_model_has(folder):
    """Not W alone, and not with B Pᵀ in it twice."""
    paths = [folder / "rso" / f"step-0000000{step}" for step in (2, 4)]
    old, new = (load_file(path / checkpoint.MODEL) for path in paths)
    saved = checkpoint.load(paths[1])
    for look in inspect(*reversed(paths), match="q_proj").looks:
        assert not torch.equal(saved.params[look.name], new[look.name]), "the two differ"
        merged = merge(saved.params, saved.state)[look.name]
        assert torch.equal(merged, new[look.name])
        change = (new[look.name] - old[look.name]).norm() / old[look.name].norm()
        assert look.measures["change"] == pytest.approx(float(change), rel=1e-4)
        assert look.measures["weight_rms"] == pytest.approx(rms(new[look.name]), rel=1e-6)
