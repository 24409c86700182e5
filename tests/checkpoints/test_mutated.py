"""Checkpoints that somebody or something changed: a clear error or what was saved, never a traceback, never silence.

Some changes are as a failing disk makes them. Others are sealed again with right checksums, as a careless tool would,
so that they reach the checks behind.
"""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.runs import TINY, corpus, here

from engine import checkpoint
from engine.checkpoint import CheckpointError
from engine.loop.trainer import Trainer
from recipes import swap, train
from recipes.build import Run, build
from recipes.registry import trained_by
from tools.inspect import inspect
from tools.inspect_report import plain

MODEL, CONFIG, OPTIMIZER, TRAINER = "model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"
FILES = (MODEL, CONFIG, OPTIMIZER, TRAINER)
TENSORS = (MODEL, OPTIMIZER)
SAME_SIZE = {"F32": ["I32", "U32"], "F64": ["I64"], "BF16": ["F16", "I16"], "I64": ["F64"], "I8": ["U8", "BOOL"]}
ODD: list[Any] = [None, True, -1, 0.5, "", "x", [], {}, [1], {"a": 1}, 10**30, math.inf, math.nan]
RUNS = {"baseline --optimizer galore --rank 4": "--precision bf16", "snsm demo --rank 4 --proj-type srht": ""}


class Base(NamedTuple):
    """A run, ready to resume from the checkpoint that it left, and one of AdamW that can take over from it."""

    folder: Path
    other: Path  # a checkpoint of an earlier step
    trainer: Trainer
    adamw: Trainer
    run: Run
    truths: dict[str, dict[str, Any]]  # what each of READERS gives on it


def sealed(folder: Path) -> None:
    """Right sizes and checksums for what is there now."""
    record = json.loads((folder / TRAINER).read_text())
    for name in FILES[:3]:
        content = (folder / name).read_bytes()
        record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(folder, record)


def seal(folder: Path, record: dict[str, Any]) -> None:
    record.pop("sha256", None)
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    (folder / TRAINER).write_text(json.dumps({**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join(file: Path, head: dict[str, Any], data: bytes) -> None:
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


# As a disk does it. Each takes (draw, folder, base).


def truncate(draw: random.Random, folder: Path, base: Base) -> None:
    file = folder / draw.choice(FILES)
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(draw: random.Random, folder: Path, base: Base) -> None:
    file = folder / draw.choice(FILES)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def flip_head(draw: random.Random, folder: Path, base: Base) -> None:
    """A bit of a safetensors head, sealed: whatever that makes of the JSON there."""
    name = draw.choice(TENSORS)
    content = bytearray((folder / name).read_bytes())
    names = content.index(b"__metadata__") if draw.random() < 0.5 else 0
    content[draw.randrange(names, names + 200 if names else 8)] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    sealed(folder)


def foreign(draw: random.Random, folder: Path, base: Base) -> None:
    file = folder / draw.choice(FILES)
    what = draw.choice(["remove", "longer", "noise", "json", "deep", "other", "folder", "utf-8"])
    if what == "remove":
        file.unlink()
    elif what == "folder":
        file.unlink()
        file.mkdir()
    elif what == "other":
        shutil.copy(base.other / file.name, file)
    else:
        more = {"longer": file.read_bytes() + b"\0", "noise": draw.randbytes(300), "json": b'{"a": [1, 2]}'}
        file.write_bytes((more | {"deep": b"[" * 100_000, "utf-8": b'{"\xff": 1}'})[what])
    if draw.random() < 0.5 and file.is_file() and file.name != TRAINER and what != "other":
        sealed(folder)


# As a careless tool does it: sealed.


def tensor_head(draw: random.Random, folder: Path, base: Base) -> None:
    """A tensor's name, shape, dtype or place."""
    file = folder / draw.choice(TENSORS)
    head, data = split(file)
    name = draw.choice([key for key in head if key != "__metadata__"])
    entry = head[name]
    match draw.choice(["rename", "shape", "flat", "dtype", "wider", "place", "drop", "add", "slot"]):
        case "rename":
            head[f"{name}x"] = head.pop(name)
        case "slot":
            head[name.replace("/", "//") + "/z"] = head.pop(name)
        case "shape":
            entry["shape"] = entry["shape"][::-1] + ([1] if len(entry["shape"]) < 2 else [])
        case "flat":
            entry["shape"] = [math.prod(entry["shape"])] if len(entry["shape"]) != 1 else [1, *entry["shape"]]
        case "dtype":
            entry["dtype"] = draw.choice([*SAME_SIZE.get(entry["dtype"], []), "F8_E4M3", "C64", "?"])
        case "wider":
            entry["dtype"], entry["shape"] = "F64", [n // 2 for n in entry["shape"]]
        case "place":
            entry["data_offsets"] = [n + draw.choice([-8, 8, 10**12]) for n in entry["data_offsets"]]
        case "drop":
            del head[name]
        case "add":
            head["model.extra.weight"] = entry
    join(file, head, data)
    sealed(folder)


def renamed_everywhere(draw: random.Random, folder: Path, base: Base) -> None:
    """A tensor under another name, also in what the head says of names; a shape turned where both sides differ."""
    file = folder / draw.choice(TENSORS)
    head, data = split(file)
    meta = head["__metadata__"]
    names = json.loads(meta["names"])
    name = draw.choice(list(names))
    entry = head[name]
    if draw.random() < 0.3 and len(set(entry["shape"])) > 1:
        entry["shape"] = entry["shape"][::-1]
    elif draw.random() < 0.3 and entry["dtype"] in SAME_SIZE:
        entry["dtype"] = SAME_SIZE[entry["dtype"]][0]
    else:
        new = draw.choice(["nobody/slot", f"{name}_2", "x", "model.layers.0.input_layernorm.weight/z"])
        head[new] = head.pop(name)
        meta["names"] = json.dumps({new if key == name else key: new if key == name else key for key in names})
    join(file, head, data)
    sealed(folder)


def meta(draw: random.Random, folder: Path, base: Base) -> None:
    """What the head of a file says beside its tensors."""
    file = folder / draw.choice(TENSORS)
    head, data = split(file)
    own = head["__metadata__"]
    key = draw.choice([key for key in own if key not in ("format", "optimizer")])
    value = own[key]
    match draw.choice(["drop", "kind", "broken", "first", "all"]):
        case "drop":
            del own[key]
        case "kind":
            own[key] = json.dumps(draw.choice(ODD))
        case "broken":
            own[key] = value[: len(value) // 2] + draw.choice(["", "}", "\\", '"'])
        case "first":
            content = json.loads(value)
            if isinstance(content, dict):
                first = draw.choice(list(content))
                content[first] = draw.choice(ODD)
            elif isinstance(content, list):
                content[0] = draw.choice([*ODD, content[-1]])
            else:
                content += 1
            own[key] = json.dumps(content)
        case "all":
            del head["__metadata__"]
    join(file, head, data)
    sealed(folder)


def settings(draw: random.Random, folder: Path) -> None:
    """What the recipe was told, of a kind that it is never told."""
    record = json.loads((folder / TRAINER).read_text())
    config = record["config"]
    if draw.random() < 0.3:
        config = config["options"]
    key = draw.choice([*config, *(key for key in ("recipe", "size", "optimizer", "options", "rank") if key in config)])
    config[key] = draw.choice([value for value in (None, "", "x", [], {}, [1], {"a": 1}) if value != config[key]])
    seal(folder, record)


def facts(draw: random.Random, folder: Path, base: Base) -> None:
    """What trainer.json or config.json says: a thing of the wrong kind, or nothing."""
    if draw.random() < 0.25:
        settings(draw, folder)
        return
    if draw.random() < 0.3:
        content = json.loads((folder / CONFIG).read_text())
        key = draw.choice([key for key in content if content[key] is not None])
        value = draw.choice([v for v in ODD if v != content[key]])
        (folder / CONFIG).write_text(json.dumps({**content, key: value} if draw.random() < 0.7 else [content]))
        sealed(folder)
        return
    record = json.loads((folder / TRAINER).read_text())
    key = draw.choice(
        [
            "schema",
            "step",
            "position",
            "tokens",
            "data",
            "previous_norm",
            "swapped",
            "config",
            "files",
            "one",
            "sequence",
        ]
    )
    if key == "one":
        record["files"][draw.choice(FILES[:3])] = draw.choice([*ODD, {"bytes": "1", "sha256": 2}, {"bytes": 1}])
    elif key == "sequence":
        record["config"]["sequence"] = draw.choice(ODD)
    elif draw.random() < 0.3:
        del record[key]
    else:
        values = ODD if key != "previous_norm" else [v for v in ODD if v not in (0.5, 10**30)]  # a norm may be that
        record[key] = draw.choice(values)
    seal(folder, record)


MUTATIONS: dict[Callable[[random.Random, Path, Base], None], int] = {
    truncate: 3, flip: 4, flip_head: 3, foreign: 2, tensor_head: 4, renamed_everywhere: 2, meta: 4, facts: 4
}  # fmt: skip


# What reads them. Each gives what it understood, as something to compare, or raises CheckpointError.


def holds(trainer: Trainer) -> dict[str, Any]:
    step = trainer.step
    state = {f"{name}/{slot}": t for name, slots in step.state.items() for slot, t in slots.items()}
    content = {name: t.detach().clone() for name, t in {**step.params, **state}.items()}
    return content | {"step": trainer.done, "position": trainer.position, "previous": step.previous.clone()}


def resumed(path: Path, base: Base) -> dict[str, Any]:
    base.trainer.resume(checkpoint.read(path))
    return holds(base.trainer)


def swapped(path: Path, base: Base) -> dict[str, Any]:
    """As a recipe does with --swap, and so tools.swap: AdamW takes over."""
    saved = checkpoint.read(path)
    base.adamw.resume(saved, swap.source(saved, base.run, trained_by(saved)))
    return holds(base.adamw)


def inspected(path: Path, base: Base) -> dict[str, Any]:
    content = plain(inspect(path))
    json.dumps(content, allow_nan=False)
    return content


READERS: dict[str, Callable[[Path, Base], dict[str, Any]]] = {
    "resume": resumed,
    "swap": swapped,
    "inspect": inspected,
}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and x.equal(y) if isinstance(x, torch.Tensor) else x == y
        for x, y in ((a[k], b[k]) for k in a)
    )


@pytest.fixture(scope="module", params=RUNS)
def base(request, tmp_path_factory) -> Base:
    shared = f"{TINY} {RUNS[request.param]} --steps 4 --no-check-memory"
    folder = corpus(tmp_path_factory.mktemp("mutated"))
    trainers: list[Trainer] = []
    runs: list[Run] = []
    loop = Trainer.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self, *given: (trainers.append(self), loop(self, *given))[1])
        patch.setattr(train, "build", lambda *given: (runs.append(build(*given)), runs[-1])[1])
        for line in (f"{request.param} --save-every 3 --out run", "baseline --out adamw"):
            done = here(folder, f"{line} {shared}")
            assert done.code == 0, done.err
    path = folder / "run" / "step-00000004"
    empty = Base(path, folder / "run" / "step-00000003", *trainers, runs[-1], {})
    made = empty._replace(truths={name: reader(path, empty) for name, reader in READERS.items()})
    assert {"galore", "snsm"} & made.truths["inspect"]["rules"].keys()
    assert not same(made.truths["resume"], made.truths["swap"])
    return made


def mutate(base: Base, folder: Path, count: int, seed: int) -> dict[str, int]:
    """`count` of them, each read by all; how often each reader refused."""
    draw = random.Random(seed)
    path, refused = folder / base.folder.name, dict.fromkeys(READERS, 0)
    for number in range(count):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(base.folder, path)
        mutation = draw.choices(list(MUTATIONS), weights=list(MUTATIONS.values()))[0]
        mutation(draw, path, base)
        what = f"seed {seed}, number {number}, {mutation.__name__}, {path}"
        for name, reader in READERS.items():
            try:
                got = reader(path, base)
            except CheckpointError as error:
                refused[name] += 1
                said = str(error)
                assert path.name in said, f"{what}: {name} does not say which: {said}"
                assert len(said) < 1000 and "\n" not in said.strip(), f"{what}: {name} says too much: {said}"
            except Exception as error:
                raise AssertionError(f"{what}: {name} failed with {error!r}") from error
            else:
                if name != "inspect":
                    told = same(got, base.truths[name])
                    assert told, f"{what}: {name} made something else of it, and said nothing"
                elif mutation in (truncate, flip, foreign):
                    shown, true = (json.dumps(report["parameters"]) for report in (got, base.truths[name]))
                    assert shown == true, f"{what}: inspect shows something else"
    return refused


@pytest.mark.run
def test_a_hundred_mutated_checkpoints(base, tmp_path):
    refused = mutate(base, tmp_path, 50, seed=1)
    assert all(count >= 40 for count in refused.values()), refused


@pytest.mark.slow
def test_two_thousand_mutated_checkpoints(base, tmp_path):
    refused = mutate(base, tmp_path, int(os.environ.get("MUTATIONS", "1000")), seed=2)
    print(refused)
    assert all(count > 800 for count in refused.values()), refused


@pytest.mark.run
def test_the_comparison_sees_a_bit(base):
    """Of what the resumed run holds: the check above, checked to fail."""
    truth = base.truths["resume"]
    name = next(name for name, t in truth.items() if isinstance(t, torch.Tensor) and t.numel() > 4)
    other = truth[name].clone()
    other.view(-1).view(torch.uint8)[3] ^= 1
    assert same(truth, dict(truth)) and not same(truth, {**truth, name: other})
