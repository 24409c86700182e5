"""Every published form of a set of images gives the same images; what is wrong with one is said in a line."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.vision import drawn, idx

from engine.data.images import folders
from engine.data.images.read import read
from engine.data.images.sets import Filed
from optimizers.contract import UsageError

CLASSES = ("cat", "dog", "owl")


def short(text: str) -> bytes:
    data = text.encode("latin-1")
    return b"U" + bytes([len(data)]) + data


def number(k: int) -> bytes:
    return b"J" + struct.pack("<i", k)


def array(pixels: np.ndarray) -> bytes:
    """An array as Python 2's numpy pickled it, in CIFAR's files."""
    raw = pixels.tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85q\x03" + short("b") + b"\x87R"
    dtype = (
        b"cnumpy\ndtype\n"
        + short("u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    )
    dtype += b"K\x00tb"
    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    return made + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"


def pickled(**items: bytes) -> bytes:
    body = b"".join(short(key) + value for key, value in items.items())
    return b"\x80\x02}q\x00(" + body + b"u."


def listed(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def cifar(folder: Path) -> Path:
    """A folder as CIFAR-10 is published: five batches of six images, and six held out."""
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        pixels, targets = drawn(6, 32, 3, seed=i)
        flat = pixels.transpose(0, 3, 1, 2).reshape(6, -1)
        labels = listed([number(int(k)) for k in targets])
        (folder / name).write_bytes(pickled(batch_label=short("x"), labels=labels, data=array(flat)))
    (folder / "batches.meta").write_bytes(pickled(label_names=listed([short(name) for name in CLASSES])))
    return folder


def jpeg(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow (the extra tasks) is not installed")
    file = io.BytesIO()
    pillow.fromarray(pixels).save(file, kind, quality=95)
    return file.getvalue()


def images(folder: Path, size: int = 8, held_out: str = "val") -> Path:
    """Folders of PNGs by class."""
    for part, count, seed in (("train", 9, 0), (held_out, 3, 1)):
        pixels, targets = drawn(count, size, 3, seed)
        for i, k in enumerate(targets):
            (folder / part / CLASSES[k]).mkdir(parents=True, exist_ok=True)
            (folder / part / CLASSES[k] / f"{i}.png").write_bytes(jpeg(pixels[i], "PNG"))
    return folder


def packed(folder: Path, **changed: np.ndarray) -> Path:
    """One .npz of JPEGs that share a header."""
    folder.mkdir()
    fields: dict[str, np.ndarray] = {"classes": np.array(CLASSES)}
    for part, count, seed in (("train", 9, 0), ("test", 3, 1)):
        pixels, targets = drawn(count, 16, 3, seed)
        files = [jpeg(image) for image in pixels]
        head = next(i for i in range(len(files[0])) if files[0][i : i + 2] == b"\xff\xda")
        assert all(file[:head] == files[0][:head] for file in files)
        bodies = [file[head:] for file in files]
        fields["jpeg_header"] = np.frombuffer(files[0][:head], np.uint8)
        fields[f"{part}_data"] = np.frombuffer(b"".join(bodies), np.uint8)
        fields[f"{part}_offsets"] = np.cumsum([0, *map(len, bodies)]).astype(np.uint32)
        fields[f"{part}_labels"] = targets
    np.savez(folder / "set.npz", **{**fields, **changed})
    return folder


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_idx_files_are_read_packed_or_not(tmp_path: Path) -> None:
    for name, small in (("plain", False), ("gz", True)):
        train, held_out, classes = read(idx(tmp_path / name, 12, 6, packed=small))
        pixels, targets = drawn(12)
        assert train.get(range(12)).equal(channels_first(pixels)) and train.targets.tolist() == targets.tolist()
        assert held_out.get([5, 0]).equal(channels_first(drawn(6, seed=1)[0])[[5, 0]])
        assert classes == ("0", "1", "2") and train.shape == (1, 8, 8)


def test_cifar_is_read_without_running_its_pickles(tmp_path: Path) -> None:
    train, held_out, classes = read(cifar(tmp_path / "cifar"))
    assert classes == CLASSES and train.targets.tolist() == [0, 1, 2, 0, 1, 2] * 5
    assert train.get(range(12, 18)).equal(channels_first(drawn(6, 32, 3, seed=2)[0]))
    assert held_out.get(range(6)).equal(channels_first(drawn(6, 32, 3, seed=5)[0]))
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (tmp_path / "cifar" / "test_batch").write_bytes(evil)
    with pytest.raises(UsageError, match="test_batch: is no batch of CIFAR, or damaged"):
        read(tmp_path / "cifar")
    assert not (tmp_path / "ran").exists()


def test_cifar_100_has_fine_classes_and_a_new_numpy_is_read(tmp_path: Path) -> None:
    import pickle

    pixels, targets = drawn(6, 32, 3)
    flat = pixels.transpose(0, 3, 1, 2).reshape(6, -1)
    for protocol in (2, 4):
        (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": list(CLASSES)}, protocol))
        for name in ("train", "test"):
            content = {b"data": flat, b"fine_labels": targets.tolist(), b"coarse_labels": [0] * 6}
            (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
        train, _, classes = read(tmp_path)
        assert classes == CLASSES and train.get(range(6)).equal(channels_first(pixels))


def test_packed_jpegs_are_read(tmp_path: Path) -> None:
    train, held_out, classes = read(packed(tmp_path / "set"))
    assert classes == CLASSES and train.shape == (3, 16, 16) and held_out.targets.tolist() == [0, 1, 2]
    got, expected = train.get([4]).float(), channels_first(drawn(9, 16, 3)[0])[[4]].float()
    assert (got.mean((1, 3)) - expected.mean((1, 3))).abs().max() < 8  # the means of rows, through a JPEG


def test_folders_are_read_also_an_image_at_a_time(tmp_path: Path) -> None:
    root = images(tmp_path)
    train, held_out, classes = read(root)
    assert classes == CLASSES and train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    by_class = channels_first(drawn(9, 8, 3)[0])[[0, 3, 6, 1, 4, 7, 2, 5, 8]]
    assert train.get(range(9)).equal(by_class) and len(held_out.targets) == 3
    lazy = folders.read(root, most=0).train
    assert isinstance(lazy, Filed) and lazy.get([7, 2]).equal(by_class[[7, 2]])
    assert read(root, 4).train.shape == (3, 4, 4)


def rewrite(path: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / path).write_bytes(data) and None


def other_size(root: Path) -> None:
    (root / "train/dog/1.png").write_bytes(jpeg(drawn(1, 10, 3)[0][0], "PNG"))


def other_class(root: Path) -> None:
    (root / "val/yak").mkdir()


def no_split(root: Path) -> None:
    (root / "val").rename(root / "held")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rewrite("train/dog/1.png", b"no image"), r"train/dog/1.png: cannot be decoded \(cannot identify"),
        (other_size, "1.png: got 10 x 10 pixels of 3 channels, expected 8 x 8 .* give --resize"),
        (other_class, "val/yak: is no class of train/, which has 3: cat, dog, owl"),
        (no_split, "got no held-out images, expected one of the folders val, validation"),
    ],
)
def test_what_is_wrong_with_a_folder_is_a_line(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(images(tmp_path))
    with pytest.raises(UsageError, match=said):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("t10k-labels-idx1-ubyte.gz", None, "got no t10k-labels-idx1-ubyte, expected it there, or compressed"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"\0\0\x08\x01abcd", mtime=0),
            "begins with 00000801, expected 00000803",
        ),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08\x00cut", "is damaged or cut off"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 12, 8, 8) + bytes(700), mtime=0),
            r"got 700 bytes, expected \(12, 8, 8\) of them",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 2) + bytes(2), mtime=0),
            "got 12 train images and 2 labels",
        ),
    ],
    ids=["no labels", "labels for images", "cut off", "too short", "other count"],
)
def test_what_is_wrong_with_idx_files_is_a_line(tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    folder = idx(tmp_path / "mnist", 12, 6, packed=True)
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(UsageError, match=said):
        read(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_labels": np.array([0, 1, 2] * 2 + [0, 1, 3])}, "got class 3 among train images, expected .* below 3"),
        ({"train_labels": np.array([0, 1])}, "got 10 train_offsets and 2 train_labels"),
        ({"test_data": np.zeros(4000, np.uint8)}, "test image 0: cannot be decoded"),
    ],
)
def test_what_is_wrong_with_a_packed_file_is_a_line(tmp_path: Path, changed: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(packed(tmp_path / "set", **changed))


def test_an_unknown_form_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not there"):
        read(tmp_path / "nothing")
    with pytest.raises(UsageError, match="got none of the forms that are known, expected MNIST's idx files"):
        read(tmp_path)
    with pytest.raises(UsageError, match="--resize 4: is for folders of image files"):
        read(idx(tmp_path / "mnist"), 4)
