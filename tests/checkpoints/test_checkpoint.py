"""A checkpoint returns what was saved bit for bit, or says which file is wrong, and survives a kill at any moment."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine import checkpoint
from engine.checkpoint import CheckpointError, form, latest, load, prune, restore_into, save
from optimizers.contract import UsageError

FILES = ("model.safetensors", "config.json", "optimizer.safetensors", "trainer.json")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.int64, torch.uint8, torch.bool)


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.detach().reshape(-1).view(torch.uint8).tolist()


def tree(state):
    return [(owner, [(slot, bits(t)) for slot, t in slots.items()]) for owner, slots in state.items()]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = bytearray(draw(st.binary(min_size=count, max_size=count)))  # any bits: NaNs, infinities, negative zeros
    if dtype == torch.bool:
        raw = bytearray(b % 2 for b in raw)
    return torch.frombuffer(raw, dtype=dtype).clone().view(shape) if count else torch.empty(shape, dtype=dtype)


names = st.text(st.sampled_from("abw._0é"), min_size=1, max_size=6)
states = st.dictionaries(names, st.dictionaries(names, tensors(), max_size=3), max_size=4)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(plain, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=3), t, max_size=3))
trainers = st.dictionaries(st.sampled_from(["seed", "cursor", "config", "grad_norm"]), trees)


def example(step=1):
    """Parameters with a tied pair, state with an owner without slots, all different for each step."""
    embed, scale = torch.full((4, 3), float(step)), torch.ones(3, dtype=torch.bfloat16)
    params = {"model.norm.weight": scale, "model.embed.weight": embed, "lm_head.weight": embed}
    state = {"model.norm.weight": {"step": torch.tensor(float(step))}, "model.embed.weight": {}}
    return params, state


def save_example(root, step=1, **trainer):
    params, state = example(step)
    return save(root, step, params, state, {"seed": 7, **trainer}, {"model_type": "llama"}, {"optimizer": "sgd"})


whole = given(st.integers(0, 10**9), st.dictionaries(names, tensors(), max_size=4), states, trainers)


def round_trip(root, step, params, state, trainer):
    path = save(root, step, params, state, trainer, {"hidden_size": 8}, {"optimizer": "x", "period": "3"})
    loaded = load(path)
    assert tree({"": loaded.params}) == tree({"": params})
    assert tree(loaded.state) == tree(state)
    assert loaded.trainer == {"step": step, **trainer}
    assert (loaded.step, loaded.model_config, loaded.path) == (step, {"hidden_size": 8}, path)
    assert loaded.header == {"optimizer": "x", "period": "3"}
    assert sorted(p.name for p in root.iterdir()) == [path.name]
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


@whole
@settings(max_examples=12)
def test_round_trip_is_bitwise_and_keeps_order(tmp_path_factory, step, params, state, trainer):
    round_trip(tmp_path_factory.mktemp("run"), step, params, state, trainer)


@pytest.mark.slow
@whole
@settings(max_examples=200)
def test_two_hundred_round_trips_are_bitwise(tmp_path_factory, step, params, state, trainer):
    round_trip(tmp_path_factory.mktemp("run"), step, params, state, trainer)


def test_tied_weights_are_stored_once_and_come_back_as_one(tmp_path):
    path = save_example(tmp_path)
    with safe_open(path / "model.safetensors", framework="pt") as content:
        assert sorted(content.keys()) == ["model.embed.weight", "model.norm.weight"]
        assert content.metadata()["format"] == "pt"
    params = load(path).params
    assert params["lm_head.weight"] is params["model.embed.weight"]


def test_trainable_parameters_and_slices_are_saved_without_their_history(tmp_path):
    whole = torch.arange(6.0, requires_grad=True)
    loaded = load(save(tmp_path, 1, {"a": whole[:3], "b": whole[3:]}, {}, {}, {})).params
    assert (loaded["a"].tolist(), loaded["b"].tolist()) == ([0, 1, 2], [3, 4, 5])
    assert not loaded["a"].requires_grad


# What cannot be saved is refused by name, and the root stays as it was.


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"state": {"w": {"basis": torch.ones(3, 2).T}}}, "w/basis: .*not contiguous"),
        ({"params": {"w": torch.ones(3, 2).T}}, "w: .*not contiguous"),
        ({"state": {"a/b": {}}}, "'a/b'"),
        ({"trainer": {"model": torch.ones(1)}}, r"trainer\.json: .*Tensor"),
        ({"model_config": {"dtype": torch.float32}}, r"config\.json: .*dtype"),
        ({"trainer": {"files": 1}}, "'files'"),
        ({"trainer": {"step": 2}}, "agree"),
        ({"header": {"owners": "me"}}, "'owners'"),
        ({"header": {"period": 3}}, r"optimizer\.safetensors"),
        ({"params": {"w": torch.ones(4).to_sparse()}}, "w"),
        (
            {"params": dict(zip("ab", (lambda t: (t[:3], t[1:]))(torch.ones(4)), strict=True))},
            "a and b: share a part of their memory",
        ),
        ({"params": {"w": torch.ones(3, device="meta")}}, "w: is .* on meta"),
        ({"params": {"w": torch.ones(3, dtype=torch.complex64)}}, "w: is torch.complex64"),
        ({"step": -1}, "-1"),
    ],
)
def test_what_cannot_be_saved_exactly_is_named(tmp_path, change, named):
    good = save_example(tmp_path)
    arguments = {"step": 1, "params": {}, "state": {}, "trainer": {}, "model_config": {}} | change
    with pytest.raises(CheckpointError, match=named):
        save(tmp_path, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert load(good).trainer["seed"] == 7


# What is damaged is named, and passed over for the one before.


def flip(file, at, bit):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def edit(file, **change):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


DAMAGE = {
    "missing": ("missing", Path.unlink),
    "empty": ("truncated|not JSON", lambda file: file.write_bytes(b"")),
    "truncated": ("truncated|not JSON", lambda file: file.write_bytes(file.read_bytes()[:-3])),
    "longer": ("too long|not JSON", lambda file: file.write_bytes(file.read_bytes() + b"x")),
    "flipped": ("damaged|not JSON|newer", lambda file: flip(file, file.stat().st_size // 2, 1)),
    "foreign": ("damaged|foreign|too long|truncated", lambda file: file.write_bytes(b"[1, 2]")),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_found(tmp_path, kind, file):
    good, bad = save_example(tmp_path, 1), save_example(tmp_path, 2)
    what, harm = DAMAGE[kind]
    harm(bad / file)
    with pytest.raises(CheckpointError, match=f"{bad.name}/{file}: .*({what})"):
        load(bad)
    found = latest(tmp_path)
    assert found.path == good
    assert [(path, file in why) for path, why in found.damaged] == [(bad, True)]


a_bit = given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 7))


def flipped(root, file, at, bit):
    path = save_example(root, seed=3, config={"lr": 1e-3, "name": "é"})
    before = load(path)
    flip(path / file, at % (path / file).stat().st_size, bit)
    try:
        after, why = load(path), ""
    except CheckpointError as error:
        after, why = before, str(error)
    assert after.trainer == before.trainer
    assert file in why or file == "trainer.json", "only the letter case of an escape or exponent may pass"


@a_bit
@settings(max_examples=40)
def test_no_flipped_bit_changes_what_is_loaded(tmp_path_factory, file, at, bit):
    flipped(tmp_path_factory.mktemp("run"), file, at, bit)


@pytest.mark.slow
@a_bit
@settings(max_examples=400)
def test_none_of_four_hundred_flipped_bits_changes_what_is_loaded(tmp_path_factory, file, at, bit):
    flipped(tmp_path_factory.mktemp("run"), file, at, bit)


def test_files_of_another_checkpoint_do_not_pass(tmp_path):
    save_example(tmp_path, 1)
    for file in ("model.safetensors", "optimizer.safetensors"):
        bad = save_example(tmp_path, 2)
        shutil.copy(tmp_path / "step-00000001" / file, bad / file)
        with pytest.raises(CheckpointError, match=f"{file}: damaged"):
            load(bad)


def test_schema_and_origin_are_checked(tmp_path):
    path = save_example(tmp_path)
    edit(path / "trainer.json", schema=form.SCHEMA + 1)
    with pytest.raises(CheckpointError, match=r"trainer.json: has schema 3, newer than 2; update"):
        load(path)
    (path / "trainer.json").write_text('{"global_step": 3}')
    with pytest.raises(CheckpointError, match=r"trainer.json: foreign"):
        load(path)
    with pytest.raises(CheckpointError, match=r"nowhere/trainer.json: missing; this is no checkpoint of leanstep"):
        load(tmp_path / "nowhere")


def test_latest_knows_steps_only_and_orders_them_as_numbers(tmp_path):
    assert latest(tmp_path / "absent")[:2] == (None, [])
    for name in ("step-1", "step-00000009x", "best", ".tmp-step-00000009"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path)[:2] == (None, [])
    save_example(tmp_path, 99_999_999)
    newest = save_example(tmp_path, 100_000_000)
    assert latest(tmp_path)[:2] == (newest, [])


def test_prune_keeps_the_newest(tmp_path):
    paths = [save_example(tmp_path, step) for step in (1, 2, 30)]
    assert prune(tmp_path, 2) == paths[:1]
    assert prune(tmp_path, 2) == []
    assert sorted(tmp_path.iterdir()) == paths[1:]
    with pytest.raises(UsageError, match="keep_last must be at least 1, got 0"):
        prune(tmp_path, 0)


# Restoring into a model.


def test_restore_copies_in_place(tmp_path):
    loaded = load(save_example(tmp_path, 5)).params
    model = torch.nn.ParameterDict({"w": torch.zeros(4, 3)})
    restore_into(dict(model.named_parameters()), {"w": loaded["lm_head.weight"]})
    assert model["w"].eq(5).all()
    assert model["w"].requires_grad


def test_restore_accepts_a_tied_weight_under_any_of_its_names():
    params, _ = example(1)
    loaded, _ = example(2)
    for names in (["lm_head.weight"], ["model.embed.weight"], ["lm_head.weight", "model.embed.weight"]):
        params["model.embed.weight"].zero_()
        restore_into(params, {name: loaded[name] for name in ["model.norm.weight", *names]})
        assert params["lm_head.weight"].eq(2).all()
        restore_into({name: params[name] for name in ["model.norm.weight", *names]}, loaded)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.norm.weight": None}, r"lacks \['model.norm.weight'\] and has unexpected nothing"),
        ({"extra": torch.ones(1)}, r"lacks nothing and has unexpected \['extra'\]"),
        ({"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}, r"norm.weight: .*\(4,\).* expected \(3,\)"),
        ({"model.norm.weight": torch.ones(3)}, "norm.weight: .*float32, expected .*bfloat16"),
        ({"lm_head.weight": torch.zeros(4, 3)}, "lm_head.weight: tied to model.embed.weight"),
    ],
)
def test_restore_refuses_what_does_not_fit_and_copies_nothing(change, named):
    params, _ = example(1)
    loaded, _ = example(2)
    loaded = {name: t for name, t in (loaded | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=named):
        restore_into(params, loaded)
    assert params["lm_head.weight"].eq(1).all()


# Kills. A child process forks workers that save step after step; each is killed, and what is left must be whole.

KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from engine.checkpoint import latest, load, save
root, mode, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
draw = random.Random(seed)

def write(step, value):
    params = {"w": torch.full((50_000,), float(value))}
    save(root, step, params, {"w": {"step": torch.tensor(value)}}, {"value": value}, {})

def worker(first, moment, report):
    calls = 0
    def dying(call):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                os._exit(9)
            return call(*arguments, **options)
        return wrapped
    if mode == "calls":  # die before the n-th of these, for every n
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
    for value in range(first, first + 3 if mode == "calls" else first + 10_000):
        write(value // 2, value)  # every step is saved twice: the second time it replaces
        os.write(report, value.to_bytes(4, "big"))
    os._exit(0)

done, moment, ended = 0, 0, False
while not ended:
    if mode == "calls" or not moment:
        shutil.rmtree(root, ignore_errors=True)
        write(0, 1)
        done = 1
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        worker(done + 1, moment, writer)
    os.close(writer)
    if mode == "random":
        time.sleep(draw.uniform(0.0, 0.002 * moment))  # ever later, so that saves succeed also where they are slow
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    acknowledged = os.read(reader, 1 << 20)
    os.close(reader)
    done = int.from_bytes(acknowledged[-4:], "big") if acknowledged else done
    found = latest(root)
    assert found.path is not None and not found.damaged, found
    got = load(found.path)
    value = got.trainer["value"]
    assert value in (done, done + 1), (value, done)
    assert got.params["w"].eq(value).all() and got.state["w"]["step"] == value and got.step == value // 2
    done, moment = value, moment + 1
    ended = moment >= 40 and done >= 10 if mode == "random" else code == 0
    if mode == "calls" or ended:
        write(10**6, 1)
        assert all(p.name.startswith("step-") for p in root.iterdir()), list(root.iterdir())
        assert load(root / f"step-{value // 2:08d}").trainer["value"] == value
print(moment, done)
"""


@pytest.mark.run
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("mode", ["calls", "random"])
def test_a_kill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path, mode):
    seed = random.randrange(1 << 30) if mode == "random" else 0
    command = [sys.executable, "-c", KILLS, str(tmp_path / "run"), mode, str(seed)]
    root = Path(checkpoint.__file__).parent.parent.parent
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, f"seed {seed}\n{child.stderr}"
    kills, saved = map(int, child.stdout.split())
    assert kills >= 25 and saved >= 4, "too few kills or saves to mean anything"


def test_all_files_of_a_checkpoint_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            path = save(tmp_path, 1, {"w": torch.ones(2)}, {"w": {"m": torch.ones(2)}}, {}, {}, None, doubled)
        finally:
            os.umask(before)
        files = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
        assert len(files) == 5 and set(files.values()) == {mode}, files


def doubled(params, state):
    """An optimizer whose weights are twice what it trains."""
    return params | {name: params[name] * 2 for name in state}


def test_the_models_file_holds_the_model_and_the_trained_weights_come_back_bitwise(tmp_path):
    w, b = torch.randn(3, 4), torch.randn(4)
    params = {"w": w, "tied": w, "b": b}
    path = save(tmp_path, 3, params, {"w": {"m": torch.ones(2)}}, {}, {}, None, doubled)
    from safetensors.torch import load_file

    model = load_file(path / "model.safetensors")
    assert model["w"].equal(w * 2) and model["b"].equal(b)
    loaded, reader = load(path), checkpoint.read(path)
    assert list(loaded.params) == list(params) and loaded.params["w"] is loaded.params["tied"]
    for name, p in params.items():
        assert loaded.params[name].equal(p) and reader.trained(name).equal(p)
    assert reader.params.read("tied").equal(w * 2)
    (path / "weights.safetensors").write_bytes(b"")
    assert latest(tmp_path).path is None, "it is verified as the others are"


def test_without_a_difference_there_is_no_file_of_trained_weights(tmp_path):
    path = save(tmp_path, 1, {"w": torch.ones(2)}, {}, {}, {}, None, doubled)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]


def test_a_checkpoint_that_another_process_is_writing_is_not_cleaned_away(tmp_path):
    """Only what a process that is gone has left is."""
    from engine.checkpoint.process import _started, this

    me, parent = this(), os.getppid()
    other = tmp_path / f".tmp-step-00000002-{parent}-{_started(parent)}"
    gone = [tmp_path / f".tmp-step-00000002-{parent}-1", tmp_path / f".tmp-step-00000003-{2**22 - 1}-5"]
    gone += [tmp_path / ".tmp-step-00000004", tmp_path / f".tmp-step-00000005-{me.pid}-{me.started}"]
    for folder in (other, *gone):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    save_example(tmp_path)
    assert (other / "model.safetensors").exists() and not any(folder.exists() for folder in gone)
