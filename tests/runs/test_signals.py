"""Whatever ends a process politely saves first; and a run goes on when nobody reads what it prints."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from helpers.runs import ONE_THREAD, ROOT, TINY, corpus, finish, here, newest, start, stop_at

from engine.terminal import output, signals

RUN = f"baseline {TINY} --steps 100000 --log-every 1 --save-every 100000 --eval-every 100000 --out run"


@pytest.mark.run
@pytest.mark.parametrize("name", [s.name for s in signals.POLITE])
def test_every_polite_signal_saves_the_step_in_hand(tmp_path, monkeypatch, name):
    signum = getattr(signal, name)
    before = {s: signal.getsignal(s) for s in signals.POLITE}
    stop_at(monkeypatch, 3, lambda: signal.raise_signal(signum))
    done = here(corpus(tmp_path), f"baseline {TINY} --log-every 5 --out run")
    assert done.code == 128 + signum
    assert done.err == f"{name}: saved run/step-00000004; continue with --resume auto\n"
    assert newest(tmp_path / "run").step == 4
    assert {s: signal.getsignal(s) for s in signals.POLITE} == before


@pytest.mark.run
@pytest.mark.parametrize(
    "name", ["SIGHUP", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGUSR1", "SIGXCPU"))]
)
def test_a_process_that_is_sent_one_saves(tmp_path, name):
    process = start(corpus(tmp_path), RUN)
    with contextlib.suppress(AttributeError):
        process.stdout.close()  # the terminal is gone as well
        process.stdout = None
    wait_for_records(tmp_path / "run", 3)
    process.send_signal(getattr(signal, name))
    process.send_signal(getattr(signal, name))  # a terminal that closes and its shell both send one
    done = finish(process)
    assert done.code == 128 + getattr(signal, name), done.err
    assert f"{name}: saved run/step-" in done.err and "Traceback" not in done.err
    assert newest(tmp_path / "run").step >= 3


def wait_for_records(folder, lines):
    import time

    end = time.monotonic() + 120
    while time.monotonic() < end:
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= lines:
            return
        time.sleep(0.05)
    raise AssertionError("the run does not get there")


@pytest.mark.run
def test_what_was_ignored_stays_ignored(tmp_path, monkeypatch):
    """As under nohup: the terminal may close, and the run goes on to its end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGHUP))
        assert here(corpus(tmp_path), f"baseline {TINY} --out run").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert newest(tmp_path / "run").step == 20


@pytest.mark.run
def test_a_signal_in_the_middle_of_a_line_is_noted_all_the_same():
    def say(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with signals.noted(say) as asked:
        assert not asked
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.run
def test_in_a_thread_signals_are_left_alone():
    before, heard = {s: signal.getsignal(s) for s in signals.POLITE}, []

    def inside():
        with signals.noted(print) as asked, signals.raised():
            heard.append(asked.signum)
            heard.append({s: signal.getsignal(s) for s in signals.POLITE})

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert heard == [None, before]


@pytest.mark.run
def test_before_the_training_a_signal_ends_the_process_with_one_line(tmp_path, monkeypatch):
    import recipes.material

    def shards(*arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(recipes.material, "cached", shards)
    done = here(corpus(tmp_path), f"baseline {TINY} --out run")
    assert done.code == 143 and done.err.startswith("SIGTERM: ended"), done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_that_takes_no_more_is_said_once(monkeypatch, capfd):
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with output.lasting():
            for step in range(3):
                print("step", step)
    said = capfd.readouterr().err
    assert said.count("the output takes no more") == 1 and "No space left" in said


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "reader that goes away", "closed"])
def test_a_run_outlives_its_output(tmp_path, how):
    line = f"baseline {TINY} --log-every 1 --out run"
    if how == "reader that goes away":
        process = start(corpus(tmp_path), line)
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        done = finish(process)
        code, err = done.code, done.err
    else:
        redirect = {"closed": ">&-", "full": ">/dev/full"}[how]
        command = f"exec {sys.executable} -m recipes.{line} {redirect}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD}
        ran = subprocess.run(
            ["sh", "-c", command], cwd=corpus(tmp_path), env=environment, capture_output=True, text=True, timeout=300
        )
        code, err = ran.returncode, ran.stderr
    assert code == 0, err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    if how != "closed":
        assert err.count("the output takes no more") == 1, err
    assert newest(tmp_path / "run").step == 20
