"""A training run that is killed again and again, wherever it happens to be, ends as one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import ONE_THREAD, ROOT, TINY, assert_identical, corpus, here

KILLS = int(os.environ.get("KILLS", "180"))  # in all, shared between the runs
EVERY = 3  # steps between checkpoints: a large part of the time is spent writing them
STEPS = 100 * EVERY

# A recipe and its flags. With --save-async on, a checkpoint may be under way for as long as it takes to the next.
RUNS = {
    "adamw": "baseline",
    "galore, in the background": "baseline --optimizer galore --rank 4 --update-proj-gap 5 --save-async on",
    "muon, two micro-batches": "baseline --optimizer muon --accumulation 2 --clip previous",
    "omgd, at switches": "omgd pretrain --active 1 --period 4step",
    "omgd by norms, at switches": "omgd pretrain --choose norms --active 1 --period 4step",
    "rso, at switches": "rso demo --rank 4 --period 5 --form products",
    "lisa": "baseline --optimizer lisa --active 1 --period 5step",
    "sgd": "baseline --optimizer sgd",
    "sumo": "sumo demo --rank 4 --update-proj-gap 5",
    "snsm, bf16, in the background": "snsm demo --rank 4 --update-proj-gap 7 --precision bf16-sr --save-async on",
}

# Forks a run from a process that has imported everything, kills it at a random moment, looks at what is left, and
# starts over. How far a run comes between two kills is the machine's affair: where one ends before it was killed often
# enough, the next begins in another folder. The last one may end. Prints what happened as JSON.
DRIVER = """
import json, os, random, runpy, shlex, signal, sys, time
from pathlib import Path
import torch, matplotlib.figure
import recipes.train, recipes.sumo_condition, tools.plot  # what takes long to import
from engine.checkpoint import latest
from engine.loop.metrics import read

line, kills, every, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(seed)
torch.set_num_threads(1)
recipe, *flags = shlex.split(line)

def begin():
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = [recipe, *flags, "--out", str(out), "--resume", "auto"]
        runpy.run_module(f"recipes.{recipe}", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)

def steps():
    # a kill may cut the line that is being written, never one before it
    return max((int(record["step"]) for record in read(out)), default=0)

def until(holds):
    end, ended = time.monotonic() + 60, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not holds() and time.monotonic() < end and os.waitid(os.P_PID, child, ended) is None:
        time.sleep(0.001)

def moment(before):
    # wherever it is: at its start, after some steps, while it writes
    where, some = draw.choice(["start", "steps", "steps", "writing", "writing"]), draw.choice([1, 2, 3, 5, 8])
    if where != "start":
        until(lambda: steps() >= before + some)
    if where == "writing":
        until(lambda: any(out.glob(".tmp-step-*")))
    time.sleep(draw.uniform(0, {"start": life, "steps": 0.05, "writing": 0.01}[where]))

killed, lost, writing, runs, saved, start, life = 0, [], 0, 1, 0, time.monotonic(), 0.5
out = Path("killed-1")
child = begin()
while True:
    if killed < kills:
        moment(steps())
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        killed += 1
        writing += any(out.glob(".*step-*"))
        found = latest(out)
        assert not found.damaged, found
        at = int(found.path.name[5:]) if found.path else 0
        assert at >= saved, "a checkpoint that was whole is gone"
        saved = at
        lost.append(steps() - at)
    elif code == 0 and killed < kills:
        runs, saved = runs + 1, 0
        out = Path(f"killed-{runs}")
    else:
        break
    child = begin()
print(json.dumps({"code": code, "kills": killed, "runs": runs, "lost": max(lost, default=0), "writing": writing,
                  "seconds": time.monotonic() - start}))
"""


def kill(folder: Path, line: str, kills: int, seed: int = 0) -> dict[str, float]:
    command = [sys.executable, "-c", DRIVER, line, str(kills), str(EVERY), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    assert done.returncode == 0, f"{done.stderr}\n{log[-2000:]}"
    assert "Traceback" not in log, log[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("case", RUNS)
def test_many_kills_lose_no_more_than_the_interval_and_change_no_bit(tmp_path, case):
    share = KILLS // len(RUNS)
    line = f"{RUNS[case]} {TINY} --steps {STEPS} --eval-every 50"
    found = kill(corpus(tmp_path), f"{line} --save-every {EVERY}", share)
    print(case, found)
    assert found["code"] == 0
    assert found["kills"] == share
    assert found["writing"] or share < 20, f"no checkpoint was being written at any kill: {found}"
    late = EVERY if "--save-async on" in line else 0  # the steps that are trained while one is written
    assert found["lost"] <= EVERY + late, found
    assert here(tmp_path, f"{line} --out straight").code == 0
    for run in range(1, found["runs"] + 1):
        assert_identical(tmp_path / f"killed-{run}", tmp_path / "straight")
