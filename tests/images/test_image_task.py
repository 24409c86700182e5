"""Which image, and what is made of it, is a function of the seed and the place in training alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.vision import LABELS, drawn, resnet

from engine.data.images.augment import augmented, judged, normalized, resized
from engine.data.images.decode import decoded
from engine.data.images.sets import Held
from engine.step.segments import Chain
from engine.tasks.images import ImageTask, blank
from engine.tasks.scores import scores
from optimizers.random import Key


def held(rows: int, size: int = 8, channels: int = 3, seed: int = 0) -> Held:
    pixels, targets = drawn(rows, size, channels, seed)
    return Held(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(targets))


def task_of(**changed: Any) -> ImageTask:
    given = dict(scores=scores(("accuracy",), len(LABELS)), config={}, augment="crop-flip", align=4)
    return ImageTask(resnet(), held(10), held(7, seed=1), 8, **{**given, **changed})


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip", "resized-crop-flip"])
def test_a_batch_is_a_function_of_its_position(augment: Any) -> None:
    """In batches of whatever size; another seed gives other crops and another order."""
    whole = task_of(augment=augment).batch(0, 36)
    parts = [task_of(augment=augment).batch(first, 3) for first in range(0, 36, 3)]
    for name, t in whole.items():
        assert torch.cat([part[name] for part in parts]).equal(t), name
    assert not task_of(augment=augment, seed=1).batch(0, 36)["pixels"].equal(whole["pixels"])
    assert {n: (t.shape, t.dtype) for n, t in blank(36, 3, 8).items()} == {
        n: (t.shape, t.dtype) for n, t in whole.items()
    }


def test_an_epoch_is_every_image_once_and_is_filled_up_with_images_that_do_not_count() -> None:
    task = task_of(augment="none", norm="none")
    for epoch in (0, 1):
        batch = task.batch(12 * epoch, 12)
        images = (batch["pixels"] * 255).round().to(torch.uint8)
        assert sorted(map(str, images[:10].tolist())) == sorted(map(str, task.train.get(range(10)).tolist()))
        assert batch["targets"][10:].tolist() == [-100] * 2 and images[10:].equal(images[:2])
        assert (batch["targets"][:10] >= 0).all()
    assert not task.batch(0, 12)["pixels"].equal(task.batch(12, 12)["pixels"])


def test_a_part_of_the_images_is_of_all_classes_in_whatever_order_a_set_has_them() -> None:
    """Every third image of this set is of one class; a part is the same whatever the seed."""
    task, other = (
        ImageTask(resnet(), held(90), held(90), 8, scores=scores((), 3), config={}, most=30, first=30, seed=seed)
        for seed in (0, 1)
    )
    (batch,) = task.evaluation(30)
    assert batch["targets"].bincount(minlength=3).min() >= 4 and len(set(task.chosen)) == task.rows == 30
    assert task.train.targets[torch.from_numpy(task.chosen)].bincount(minlength=3).min() >= 4
    assert task.chosen.tolist() == other.chosen.tolist() == sorted(task.chosen.tolist())


def test_crops_and_reflections_are_of_the_image() -> None:
    """Every crop stands somewhere in the padded image; all places and both reflections come up; each row its own."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    rows = [(epoch, 5) for epoch in range(400)]
    found = augmented(image.expand(400, -1, -1, -1), "crop-flip", 8, rows, Key(0), padding=1)
    padded, seen = torch.nn.functional.pad(image, (1,) * 4)[0, 0], set()
    for crop in found[:, 0]:
        seen |= {
            (top, left, flip)
            for flip in (False, True)
            for top in range(3)
            for left in range(3)
            if (crop.flip(1) if flip else crop).equal(padded[top : top + 8, left : left + 8])
        }
    assert len(seen) == 18
    assert augmented(image, "crop-flip", 8, [(3, 5)], Key(0), 1).equal(found[3:4])
    assert not augmented(image.expand(9, -1, -1, -1), "crop-flip", 8, [(3, i) for i in range(9)], Key(0), 1).equal(
        found[:9]
    )
    flipped = augmented(image.expand(400, -1, -1, -1), "flip", 8, rows, Key(0))
    share = sum(bool(one.equal(image[0].flip(2))) for one in flipped) / 400
    assert 0.4 < share < 0.6
    scaled = augmented(image.expand(50, -1, -1, -1), "resized-crop-flip", 8, rows[:50], Key(0))
    assert scaled.shape == (50, 1, 8, 8) and scaled.min() >= 1 and scaled.max() <= 64
    assert len({str(one.tolist()) for one in scaled}) > 45


def test_crops_of_random_size_are_of_the_image_as_it_was_read() -> None:
    """A crop of 8 % or more of the area in `side` rows, no value of which the image lacks; small ones are not blurred
    by a resize of the whole before."""
    image = torch.arange(0, 256, 2, dtype=torch.uint8).view(1, 1, 1, 128).expand(1, 1, 128, 128)
    found = augmented(image.expand(40, -1, -1, -1), "resized-crop-flip", 16, [(0, i) for i in range(40)], Key(0))
    assert found.shape == (40, 1, 16, 16)
    spans = (found.amax((1, 2, 3)).int() - found.amin((1, 2, 3)).int()).abs()  # 2 a column, 15 of 16 columns
    columns = spans / 2 * 16 / 15
    assert 128 * 0.08**0.5 * 0.8 < columns.min() < 55 and 100 < columns.max() <= 130


def test_an_evaluation_sees_the_middle_where_training_takes_crops_of_random_size(tmp_path: Path) -> None:
    """As published recipes for ImageNet do: the shorter side resized to 256, and the 224 pixels in the middle; here 16
    and 14. Images no larger than the model's, and other augmentations, are seen whole."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "one.png")
    read = decoded(tmp_path / "one.png", "one", 16)[None]
    plain = pillow.open(tmp_path / "one.png").resize((32, 16), pillow.Resampling.BILINEAR).crop((9, 1, 23, 15))
    assert judged(read, "resized-crop-flip", 14)[0].equal(torch.from_numpy(np.array(plain)).permute(2, 0, 1))
    assert judged(read, "crop-flip", 14).equal(resized(read, (14, 14)))
    assert judged(read, "resized-crop-flip", 32).equal(resized(read, (32, 32)))
    assert judged(read, "resized-crop-flip", 16).equal(read)
    assert judged(read, "resized-crop-flip", 15).equal(read[:, :, :15, :15])
    task = ImageTask(resnet(), held(4, 16), held(4, 16), 14, scores=scores((), 3), config={}, norm="none")
    task.augment = "resized-crop-flip"
    (batch,) = task.evaluation(4)
    expected = task.held_out.get(range(4))[:, :, 1:15, 1:15]
    assert (batch["pixels"] * 255).round().to(torch.uint8).equal(expected)


def test_pixels_are_resized_and_normalized() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert resized(pixels, (2, 2)).equal(pixels[:, :, :2, :2]) and resized(pixels, (8, 8)).shape == (1, 3, 8, 8)
    got = normalized(pixels, "imagenet")[0, :, 0, 0]
    expected = torch.tensor([(0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(got, expected)
    assert normalized(pixels[:, :1], "half").unique().tolist() == [-1.0]


def test_accuracy_is_over_all_held_out_images_and_batch_norm_stands_still() -> None:
    """In batches of whatever size, also where the last one is filled up."""
    task, found = task_of(), []
    chain = Chain(task.segments())
    params = dict(task.model.named_parameters())
    before = {name: b.clone() for name, b in task.model.named_buffers()}
    for count in (7, 3):
        sums: dict[str, Any] = {}
        for batch in task.evaluation(count):
            assert len(batch["targets"]) == count
            for name, more in task.evaluate(chain, params, batch).items():
                sums[name] = sums[name] + more if name in sums else more
        found.append(task.report(sums))
    model = task.model.eval()
    logits = model(normalized(task.held_out.get(range(7)), "half"))
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["accuracy"] == pytest.approx(float((logits.argmax(1) == task.held_out.targets).double().mean()))
    loss = float(torch.nn.functional.cross_entropy(logits, task.held_out.targets))
    assert [one["loss"] for one in found] == pytest.approx([loss, loss], rel=1e-5)
    assert all(b.equal(before[name]) for name, b in model.named_buffers())
    assert "accuracy" in task.shown(found[0]) and (task.unit, task.loss_unit) == ("images", "nats per image")
