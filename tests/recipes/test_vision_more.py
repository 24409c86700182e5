"""Images with what goes beside training: every precision, another optimizer in the middle, plans, kill -9 of a ViT."""

import time
from pathlib import Path

import pytest
import torch
from helpers.runs import assert_identical, column, finish, here, newest, start, tool
from helpers.vision import idx

pytestmark = pytest.mark.run

SMALL = "--data set --compile off --no-check-memory --micro-batch 16 --eval-epochs 2 --log-every 1 --padding 1"
BODY = "--body.hidden-size 16 --body.num-hidden-layers 3 --body.num-attention-heads 2"
KINDS = {
    "resnet": f"baseline resnet {SMALL} --epochs 4 --lr 0.1 --warmup 2",
    "vit": f"baseline vit {SMALL} {BODY} --epochs 6 --lr 1e-2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    idx(tmp_path / "set", 96, 24)
    return tmp_path


def some(*fast: tuple[str, str]) -> list[object]:
    """Every model in every precision; all but the `fast` ones are slow."""
    pairs = [(kind, precision) for kind in KINDS for precision in ("bf16", "bf16-sr", "mixed")]
    return [pytest.param(*pair, marks=() if pair in fast else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("kind", "precision"), some(("resnet", "mixed"), ("vit", "bf16-sr")))
def test_it_learns_in_every_precision(folder: Path, kind: str, precision: str) -> None:
    """Also what has running statistics, which are read back in the dtype that they were trained in."""
    done = here(folder, f"{KINDS[kind]} --precision {precision} --out run")
    assert done.code == 0, done.err
    assert column(folder / "run", "eval/accuracy")[-1][1] > 0.6
    expected = torch.float32 if precision == "mixed" else torch.bfloat16
    saved = newest(folder / "run")
    assert {p.dtype for p in saved.params.values() if p.is_floating_point()} == {expected}
    done = here(
        folder,
        f"{KINDS[kind]} --precision {precision} --steps {saved.step + 2} --resume auto --out run".replace(
            f"--epochs {4 if kind == 'resnet' else 6}", ""
        ),
    )
    assert done.code == 0, done.err
    assert newest(folder / "run").step == saved.step + 2


def test_a_resnet_goes_on_under_another_optimizer(folder: Path) -> None:
    """Running statistics stay, weights stay, and momentum becomes what the other one keeps."""
    first = f"baseline resnet {SMALL} --steps 6 --lr 0.1 --schedule constant --warmup 0 --out run"
    assert here(folder, first).code == 0
    before = newest(folder / "run")
    then = f"omgd resnet {SMALL} --steps 12 --lr 0.05 --schedule constant --warmup 0 --out run --resume auto"
    done = here(folder, f"{then} --swap convert")
    assert done.code == 0, done.err
    assert "converted" in done.out
    after = newest(folder / "run")
    assert (before.step, after.step) == (6, 12)
    assert int(after.params["bn1.num_batches_tracked"]) == 12
    first_losses = [loss for _, loss in column(folder / "run", "train/loss")]
    assert first_losses[6] < 1.3 * first_losses[5] + 0.3, "what was learned is still there"


def test_a_vit_goes_on_under_another_optimizer(folder: Path) -> None:
    line = f"{SMALL} {BODY} --schedule constant --warmup 0 --out run"
    assert here(folder, f"baseline vit {line} --steps 12 --lr 1e-2").code == 0
    done = here(folder, f"snsm vit {line} --steps 18 --lr 1e-2 --rank 4 --resume auto --swap convert")
    assert done.code == 0, done.err
    losses = [loss for _, loss in column(folder / "run", "train/loss")]
    assert len(losses) == 18 and losses[12] < 1.3 * losses[11] + 0.3


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("line", ["omgd resnet", f"omgd vit {BODY} --active 1"], ids=["resnet", "vit"])
def test_a_plan_knows_images(folder: Path, line: str) -> None:
    done = tool(folder, f"tools.plan {line} --data set --micro-batch 16")
    assert done.code == 0, done
    assert "activations" in done.out and "optimizer state" in done.out


@pytest.mark.slow
def test_a_killed_vit_goes_on_to_the_same_end(folder: Path) -> None:
    """As users run it, in processes, with kill -9 behind a checkpoint, in the middle of masks."""
    line = f"omgd vit {SMALL} {BODY} --active 1 --epochs 20 --save-every 10 --keep-last 20"
    whole, process = (start(folder, f"{line} --out {out}") for out in ("whole", "killed"))
    until = time.monotonic() + 240
    while not (folder / "killed" / "step-00000020").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert finish(whole).code == 0
    assert 20 <= newest(folder / "killed").step < 120
    done = finish(start(folder, f"{line} --out killed --resume auto"))
    assert done.code == 0 and "resuming" in done.out, done.err
    assert_identical(folder / "killed", folder / "whole", "images")
