"""A run owns its folder from its first second. Processes here are real, and start at the same instant."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from helpers.grids import covering
from helpers.owner import owners
from helpers.runs import ONE_THREAD, ROOT, TINY, corpus, finish, here, newest, refused, start, stop_at, tool

from engine.checkpoint import lock
from engine.checkpoint.lock import FILE, InUse, claim
from engine.checkpoint.process import Process, this
from optimizers.contract import UsageError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD}
each_flock = pytest.mark.parametrize("flocks", [True, False], ids=["flock", "no flock"])


@pytest.mark.run
@each_flock
def test_of_several_that_start_at_once_one_owns_the_folder(tmp_path, flocks):
    with owners(tmp_path, "claim", "run", 4, flocks) as started:
        said = [one.answer() for one in started]
        (owner,) = (one for one, line in zip(started, said, strict=True) if line.startswith("owns"))
        refusals, pid = [line for line in said if line.startswith("refused")], owner.process.pid
        assert len(refusals) == 3 and all(f"--out run: in use by process {pid} on " in line for line in refusals), said
        assert all("since 20" in line and f"kill {pid}" in line for line in refusals), said
        with pytest.raises(InUse):
            claim(tmp_path / "run").__enter__()
        owner.end()
        assert not list(tmp_path.glob("run/*"))


@pytest.mark.run
@each_flock
def test_several_that_take_a_new_folder_take_different_ones(tmp_path, flocks):
    with owners(tmp_path, "claim_new", "runs/new", 3, flocks) as started:
        assert sorted(one.answer() for one in started) == [f"owns runs/new{n}" for n in ("", "-2", "-3")]
        for one in started:
            one.end()
        assert not list(tmp_path.glob("runs/*"))


@pytest.mark.run
@each_flock
def test_the_lock_of_a_process_that_was_killed_is_taken_over_by_one(tmp_path, flocks, monkeypatch):
    with owners(tmp_path, "claim", "run", 1, flocks) as (killed,):
        assert killed.answer().startswith("owns")
        killed.kill()
        assert (tmp_path / "run" / FILE).exists()
    with owners(tmp_path, "claim", "run", 3, flocks) as started:
        assert [one.answer()[:4] for one in started].count("owns") == 1
    if not flocks:
        monkeypatch.setattr(lock, "_flocks", lambda folder: False)
    said = []
    with claim(tmp_path / "run", said.append):
        assert len(said) == 1 and "was owned by process" in said[0] and "taken over" in said[0]
        assert json.loads((tmp_path / "run" / FILE).read_text())["process"]["pid"] == os.getpid()
    assert not (tmp_path / "run" / FILE).exists()


def write_lock(folder: Path, **change) -> Path:
    folder.mkdir()
    process = this()._asdict() | change
    file = folder / FILE
    file.write_text(json.dumps({"process": process, "command": "python -m x", "since": time.time()}))
    return file


STALE = {
    "of a process that ended, its number given away again": {"started": "1"},
    "of a process that ended": {"pid": 2**22 - 1},
    "of before this machine was started": {"place": "another boot"},
    "of another machine that is gone": {"host": "elsewhere", "place": "another boot"},
}


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("case", STALE)
def test_stale_locks_are_taken_over_with_a_line(tmp_path, monkeypatch, case, flock):
    monkeypatch.setattr(lock, "WATCH", 0.1)
    if not flock:
        monkeypatch.setattr(lock, "_flocks", lambda folder: False)
    file = write_lock(tmp_path / "run", **STALE[case])
    if "before this machine" in case:
        os.utime(file, (0, 0))
    said = []
    with claim(tmp_path / "run", said.append):
        assert "taken over" in said[-1]
        assert len(said) == (2 if "another machine" in case else 1), said


@pytest.mark.run
@pytest.mark.parametrize("flock", [True, False])
def test_an_owner_on_another_machine_that_touches_its_lock_is_left_alone(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(lock, "WATCH", 20)
    if not flock:
        monkeypatch.setattr(lock, "_flocks", lambda folder: False)
    file = write_lock(tmp_path / "run", host="elsewhere", place="another boot")
    stop = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.2)
    beat = threading.Thread(target=lock._beat, args=(file, stop))
    beat.start()
    try:
        with pytest.raises(InUse, match="on elsewhere"):
            claim(tmp_path / "run", lambda text: None).__enter__()
    finally:
        stop.set()
        beat.join()
    assert json.loads(file.read_text())["process"]["host"] == "elsewhere"


@pytest.mark.parametrize(("content", "flock"), covering(["", "{", "[]", '{"process": 3}', "\0" * 100], [True, False]))
def test_a_lock_that_says_nothing_is_no_obstacle_for_ever(tmp_path, monkeypatch, content, flock):
    monkeypatch.setattr(lock, "WATCH", 0.1)
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    if not flock:
        monkeypatch.setattr(lock, "_flocks", lambda folder: False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_text(content)
    with claim(tmp_path / "run", lambda text: None):
        assert json.loads((tmp_path / "run" / FILE).read_text())["process"]["pid"] == os.getpid()


@pytest.mark.parametrize("flock", [True, False])
def test_two_threads_of_one_process_are_two(tmp_path, monkeypatch, flock):
    if not flock:
        monkeypatch.setattr(lock, "_flocks", lambda folder: False)
    with claim(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a").exists(), "what was made and stays empty goes"
    with claim(tmp_path / "run"):
        with pytest.raises(InUse):
            claim(tmp_path / "run").__enter__()
        with pytest.raises(InUse):
            claim(tmp_path / "x" / ".." / "run").__enter__()
    with claim(tmp_path / "run"):
        pass


@pytest.mark.run
def test_a_child_does_not_keep_its_parents_lock(tmp_path):
    code = """
    import os, sys, time
    from pathlib import Path
    from engine.checkpoint.lock import claim
    with claim(Path("run")):
        if not (child := os.fork()):
            os.close(1)  # else the test would wait for its end
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), 9)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        with claim(tmp_path / "run", lambda text: None):
            pass
    finally:
        os.kill(int(ran.stdout), signal.SIGKILL)


def test_a_folder_that_cannot_be_made_or_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    for path in ("file", "file/below", "dangling", "x" * 300, "/proc/run"):
        with pytest.raises(UsageError, match="--out .*: cannot be .*; .*choose another folder"):
            claim(tmp_path / path).__enter__()


def test_other_errors_of_flock_do_not_pass_for_its_absence(tmp_path, monkeypatch):
    import errno

    if lock.fcntl is None:
        pytest.skip("no flock here")

    def refuse(code):
        def flock(descriptor, how):
            raise OSError(code, os.strerror(code))

        return flock

    for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(lock.fcntl, "flock", refuse(code))
        with claim(tmp_path / "run"), pytest.raises(InUse):
            claim(tmp_path / "run").__enter__()
    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(UsageError, match="cannot be written"):
        claim(tmp_path / "run").__enter__()


# Runs.

SLOW = f"baseline {TINY} --steps 100000 --log-every 1 --save-every 100000 --eval-every 100000"


@pytest.mark.slow
@pytest.mark.run
def test_runs_started_together_take_folders_of_their_own(tmp_path):
    corpus(tmp_path)
    started = [start(tmp_path, f"baseline {TINY} --steps 2") for _ in range(3)]
    done = [finish(p) for p in started]
    assert [d.code for d in done] == [0, 0, 0], [d.err for d in done]
    made = sorted(p.name for p in (tmp_path / "runs").iterdir() if p.name != ".data")
    assert made == [f"baseline-adamw-demo{n}" for n in ("", "-2", "-3")]
    assert all(newest(tmp_path / "runs" / name).step == 2 for name in made)


@pytest.mark.run
@pytest.mark.parametrize("flags", [pytest.param("--out run", marks=pytest.mark.slow), "--out run --resume auto"])
def test_a_second_run_in_the_folder_is_refused_from_the_first_second_and_changes_nothing(tmp_path, monkeypatch, flags):
    seen = []

    def second():
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        done = finish(start(tmp_path, f"baseline {TINY} {flags}"))
        seen.append((done, before == (tmp_path / "run" / "metrics.jsonl").read_bytes()))

    stop_at(monkeypatch, 5, second)
    assert here(corpus(tmp_path), f"baseline {TINY} --log-every 1 --out run").code == 0
    ((done, same),) = seen
    assert f"--out run: in use by process {os.getpid()} on " in refused(done, 2)
    assert same and not (tmp_path / "run" / FILE).exists()


def test_a_run_that_fails_before_it_does_anything_leaves_no_folder(tmp_path):
    corpus(tmp_path)
    for flags in ("--data nowhere.txt --out a/b/c", "--size.num-attention-heads 7 --out a/b/c", "--tokenizer nowhere"):
        refused(here(tmp_path, f"baseline {TINY} {flags}"), 2)
        assert not (tmp_path / "a").exists()
        assert not [p for p in tmp_path.glob("runs/*") if p.name != ".data"]
    (tmp_path / "mine").mkdir()
    refused(here(tmp_path, f"baseline {TINY} --data nowhere.txt --out mine"), 2)
    assert (tmp_path / "mine").is_dir(), "what was there stays"


@pytest.mark.run
def test_every_end_lets_go(tmp_path, monkeypatch):
    corpus(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert here(tmp_path, f"baseline {TINY} --out stopped").code == 143
    assert here(tmp_path, f"baseline {TINY} --lr 1e30 --out diverged").code == 4
    assert here(tmp_path, f"baseline {TINY} --steps 2 --out done").code == 0
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.run
def test_a_comparison_owns_its_folder(tmp_path):
    corpus(tmp_path)
    with claim(tmp_path / "cmp"):
        done = tool(tmp_path, f'recipes.compare cmp --methods "adamw @ 1e-3 = baseline" -- {TINY}')
    assert done.code == 2 and done.err.startswith(f"error: OUT cmp: in use by process {os.getpid()}"), done


@pytest.mark.run
def test_a_swap_owns_the_folder_it_makes(tmp_path):
    corpus(tmp_path)
    assert here(tmp_path, f"baseline {TINY} --steps 2 --out run").code == 0
    with claim(tmp_path / "swapped"):
        done = tool(tmp_path, 'tools.swap run swapped --to "baseline --optimizer sgd"')
    assert done.code == 2 and "swapped: in use by process" in done.err, done
    assert not (tmp_path / "swapped").exists()


def test_the_identity_of_a_process():
    me = this()
    assert me.lives
    assert me._replace(pid=2**22 - 1).lives is False
    assert me._replace(place="elsewhere").lives is None
    assert Process(*me) == me
