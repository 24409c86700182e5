"""ViTs and ResNets on images, of every recipe that has them, on a set made here: whole runs, resumed ones, one line."""

import json
from pathlib import Path

import pytest
from helpers.grids import few
from helpers.runs import assert_identical, column, finish, here, killed, newest, refused, start
from helpers.vision import idx

from models.vit_weights import load
from recipes import registry
from recipes.build import build
from recipes.registry import parsed

pytestmark = pytest.mark.run

SMALL = "--data set --compile off --no-check-memory --micro-batch 16 --eval-epochs 2 --log-every 1 --padding 1"
VIT = f"{SMALL} --body.hidden-size 16 --body.num-hidden-layers 3 --body.num-attention-heads 2"
RUNS = {  # of six steps an epoch
    "omgd vit": f"omgd vit {VIT} --epochs 8 --active 2 --lr 1e-2",
    "omgd resnet": f"omgd resnet {SMALL} --epochs 4 --lr 0.1 --warmup 2",
    "snsm vit": f"snsm vit {VIT} --epochs 4 --rank 4 --update-proj-gap 4",
    "baseline vit": f"baseline vit {VIT} --epochs 8 --lr 1e-2",
    "baseline resnet": f"baseline resnet {SMALL} --epochs 4 --optimizer muon --lr 1e-2 --warmup 2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    idx(tmp_path / "set", 96, 24)
    return tmp_path


@pytest.mark.parametrize("name", few(RUNS, "omgd resnet", "snsm vit"))
def test_a_run_learns_and_says_how_well(folder: Path, name: str) -> None:
    done = here(folder, f"{RUNS[name]} --out run", ends=True)
    assert done.code == 0, done.err
    accuracy = column(folder / "run", "eval/accuracy")
    steps = 48 if "--epochs 8" in RUNS[name] else 24
    assert [step for step, _ in accuracy] == [*range(12, steps + 1, 12)] and accuracy[-1][1] > 0.6, accuracy
    assert "96 training images, 24 held out, of 3 classes, 8 x 8 pixels of 1 channel" in done.out
    assert "images/s" in done.out and "tokens" not in done.out
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["images"] == steps * 16 and result["eval/accuracy"] == accuracy[-1][1]
    assert (folder / "run" / "loss.png").stat().st_size > 1000


RESUMED = {
    "resnet, tensors": "omgd resnet --optimizer sgd",
    "resnet, muon": "baseline resnet --optimizer muon --lr 1e-2",
    "vit, layers": f"omgd vit {VIT.removeprefix(SMALL)} --active 1",
}


@pytest.mark.parametrize("name", few(RESUMED, "resnet, tensors", "vit, layers"))
def test_a_resumed_run_ends_as_one_without_a_break(folder: Path, name: str) -> None:
    """In the middle of an epoch and of a mask: weights, state, running statistics, order and crops of the images."""
    line = f"{RESUMED[name]} {SMALL} --epochs 3 --save-every 8 --keep-every 8"
    assert here(folder, f"{line} --out whole").code == 0
    done = here(folder, f"{line} --out again --resume whole/step-00000008")
    assert done.code == 0, done.err
    again, whole = newest(folder / "again"), newest(folder / "whole")
    assert again.step == whole.step == 18
    assert again.params.keys() == whole.params.keys()
    for saved, expected in ((again.params, whole.params), *((again.state[n], s) for n, s in whole.state.items())):
        assert all(saved[key].equal(t) for key, t in expected.items())
    if "resnet" in name:
        assert whole.params["bn1.running_mean"].abs().sum() > 0
        assert int(whole.params["layer2.0.bn1.num_batches_tracked"]) == 18
    late = [row for row in column(folder / "whole", "train/loss") if row[0] > 8]
    assert [row for row in column(folder / "again", "train/loss") if row[0] > 8] == late
    assert again.trainer["position"] == 18 * 16 and again.trainer["images"] == whole.trainer["images"]


@pytest.mark.slow  # to resume in the same process is fast: above
def test_a_killed_run_goes_on_to_the_same_end(folder: Path) -> None:
    """As users run it, in processes, with kill -9 behind a checkpoint."""
    line = f"omgd resnet {SMALL} --epochs 20 --save-every 10 --keep-last 20"
    whole = start(folder, f"{line} --out whole")
    killed(folder, f"{line} --out killed", "killed/step-00000020")
    assert finish(whole).code == 0
    assert 20 <= newest(folder / "killed").step < 120
    done = finish(start(folder, f"{line} --out killed --resume auto"))
    assert done.code == 0 and "resuming" in done.out, done.err
    assert_identical(folder / "killed", folder / "whole", "images")


LINES = {
    "omgd vit --data nothing": "--data nothing: is not there",
    "omgd vit": "--data: got none; give the folder of the images",
    "baseline resnet --data set --num-classes 10": "--num-classes: got 10, and set has 3",
    "baseline resnet --data set --channels 3": "--channels: got 3, and set has 1",
    "baseline vit --data set --body.patch-size 3": "image_size: got 8, expected a multiple of patch_size = 3",
    "snsm vit --data set --train-images 97": "--train-images: got 97, and set has 96",
    "omgd resnet --data set --padding 2 --augment flip": "--padding: changes nothing with --augment flip",
    "omgd resnet --data set --epochs 2 --steps 9": "--epochs and --steps say the same",
    "snsm vit --data set --epochs 0": "--epochs: got 0, expected a number above 0; --steps counts in steps",
    "omgd resnet --data set --milestones 0.5": "milestones: got [0.5] with the schedule 'cosine'; it has none",
    "snsm vit --data set --preset imagenet": "--preset imagenet: SNSM's authors have a ViT on cifar10 and cifar100",
    "baseline resnet --data set --optimizer muon --model resnet50": "invalid choice",
}


@pytest.mark.parametrize("line", LINES)
def test_what_is_wrong_is_one_line(folder: Path, line: str) -> None:
    done = here(folder, f"{line} --compile off --out run")
    if LINES[line] == "invalid choice":
        assert done.code == 2 and "resnet50" in done.err
    else:
        assert LINES[line] in refused(done, 2)


def test_a_checkpoint_of_other_images_or_another_model_is_one_line(folder: Path) -> None:
    assert here(folder, f"omgd resnet {SMALL} --epochs 1 --out run").code == 0
    idx(folder / "other", 96, 24, size=16)
    for changed, said in (
        ("--augment none", "augment"),
        ("--train-images 48", "images"),
        ("--model resnet18", "another model"),
    ):
        done = here(folder, f"omgd resnet {SMALL} --epochs 2 --resume run --out again {changed}".replace("  ", " "))
        assert said in refused(done, 2 if changed == "--augment none" else 5), changed


def test_a_vit_begins_with_a_published_folder_and_is_one_again(folder: Path) -> None:
    """Its own classifier where the classes are its own; another size of image, or another number of channels, is a
    line."""
    assert here(folder, f"baseline vit {VIT} --epochs 1 --out run").code == 0
    checkpoint = next((folder / "run").glob("step-*"))
    model = load(checkpoint)
    assert model.config.labels == ("0", "1", "2") and model.config.image_size == 8
    line = f"omgd vit {SMALL} --epochs 1 --active 1"
    done = here(folder, f"{line} --init {checkpoint} --out more")
    assert done.code == 0 and "drawn anew" not in done.out, done.err
    first = column(folder / "more", "train/loss")[0][1]
    assert first < 1.05, "a run that began with nothing would begin at log 3"
    idx(folder / "set", 96, 24, size=12)
    assert here(folder, f"{line} --init {checkpoint} --out resized").code == 0
    assert "--image-size: got 12, expected 8" in refused(here(folder, f"{line} --init {checkpoint} --image-size 12"), 2)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("omgd resnet --preset cifar10", {"lr": 0.1, "micro_batch": 256, "milestones": (0.5, 0.75), "keep": 0.5}),
        ("omgd resnet --preset imagenet --lr 0.2", {"lr": 0.2, "model": "resnet18", "image_size": 224, "resize": 256}),
        ("omgd vit --preset cifar100", {"active": 3, "period": "5epoch", "gamma": 0.95, "lr": 1e-4}),
        ("baseline vit --preset imagenet", {"epochs": 10.0, "milestones": (0.2, 0.4, 0.6, 0.8)}),
        ("baseline resnet --preset cifar100", {"gamma": 0.2, "milestones": (0.3, 0.6, 0.75), "epochs": 200.0}),
        ("snsm vit --preset cifar10", {"optimizer": "adam_snsm", "lr": 1e-3, "image_size": 224, "micro_batch": 64}),
    ],
)
def test_presets_are_the_papers(line: str, fields: dict[str, object]) -> None:
    config = parsed(line.split(), "test")
    assert {name: getattr(config, name) for name in fields} == fields
    assert registry.from_plain(type(config), config.plain()).plain() == config.plain()
    if line.startswith("omgd resnet"):
        assert config.options.nesterov and config.plain()["by"] == "tensors"


def test_the_receipt_of_a_resnet_speaks_of_what_it_has() -> None:
    for line in ("baseline resnet --optimizer muon", "omgd resnet --rest-lr 1e-3"):
        made = build(parsed(line.split(), "test"), 10)
        found = {group.name: group.why for group in made.config.groups(made.params)}
        assert "convolutions" in next(iter(found.values())) and "last layer" in found["adamw-rest"], found
        assert not any("attention" in why or "embedding" in why for why in found.values()), found
