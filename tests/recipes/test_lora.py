"""The row of LoRA: peft's adapters under the same task, as a loop by hand trains them."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.finetuning import FLAGS, folder
from helpers.runs import assert_identical, column, here, newest, refused
from rich.console import Console

from models import weights
from models.packed import documents_of
from recipes.build import build
from recipes.finetune import parse as parse_finetune
from recipes.lora import BASE, parse
from recipes.train import material_of

LINE = FLAGS.replace("finetune", "lora") + "--lr 1e-2 --schedule constant --warmup 0 "


def test_without_peft_it_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(here(folder(tmp_path), LINE + "--steps 1 --out run"), 2)


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_adapters_that_say_nothing_are_refused(tmp_path: Path, alpha: str) -> None:
    said = refused(here(folder(tmp_path), LINE + f"--alpha={alpha} --steps 1 --out run"), 2)
    assert "--alpha: got" in said and "above 0" in said


@pytest.mark.run
def test_it_trains_as_a_loop_by_hand_does_and_nothing_else_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="peft (the extra lora) is not installed")
    done = here(folder(tmp_path), LINE + "--rank 4 --alpha 8 --steps 6 --eval-every 3 --out run")
    assert done.code == 0, done
    monkeypatch.chdir(tmp_path)
    config = parse(LINE.split()[1:] + ["--rank", "4", "--alpha", "8", "--steps", "6"])
    material = material_of(config, Console(quiet=True))
    run = build(config, material.vocabulary)
    begun = run.place("cpu")
    task = material.task(run)
    model = weights.load(tmp_path / "model", torch.float32)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*layers\.\d+\..*_proj"), model
    )
    own = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert own.keys() == {name for name in begun if "lora_" in name} and own
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(begun[name])
            assert bool(p.any()) is (".lora_A." in name), name
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(6):
        batches = [task.batch(4 * step + 2 * k, 2) for k in range(2)]
        said = sum(int((b["targets"] != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            hidden = model(batch["input_ids"], documents=documents_of(batch))
            loss = F.cross_entropy(hidden.flatten(0, 1), batch["targets"].flatten(), reduction="sum") / said
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert [value for _, value in column(tmp_path / "run", "train/loss")] == pytest.approx(losses, rel=1e-4)
    trained = newest(tmp_path / "run")
    for name, p in own.items():
        torch.testing.assert_close(trained.params[name], p.detach(), rtol=2e-3, atol=2e-4)
    for name, p in trained.params.items():
        if name not in own:
            assert p.equal(whole[name.replace(BASE, "")]), name
    assert set(trained.state) == own.keys()


@pytest.mark.run
def test_it_begins_as_the_published_model_and_goes_on_bitwise(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft (the extra lora) is not installed")
    folder(tmp_path)
    for flags in ("--out parts --steps 2", "--out parts --steps 4 --resume auto", "--out whole --steps 4"):
        done = here(tmp_path, LINE + "--eval-every 2 " + flags)
        assert done.code == 0, done
    assert_identical(tmp_path / "parts", tmp_path / "whole")
    plain = here(tmp_path, FLAGS + "--steps 1 --out plain")
    assert plain.code == 0, plain
    assert column(tmp_path / "whole", "eval/loss")[0] == column(tmp_path / "plain", "eval/loss")[0]


def test_steps_and_epochs_say_the_same(tmp_path: Path) -> None:
    for read in (parse, parse_finetune):
        with pytest.raises(Exception, match="--epochs and --steps say the same"):
            read(["model", "--epochs", "1", "--steps", "2"])
