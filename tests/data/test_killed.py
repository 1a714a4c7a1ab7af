"""Input killed with kill -9 at random steps goes on, on another number of processes, as if nothing
had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpora
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COUNT, BATCH, STEPS, EVERY = 101, 8, 40, 3
# One process of a job: it reads its part of the batches, notes their ids, and the step it is at.
READER = """
import json, os, sys, time
from vlp_jax.data.pipeline import TrainPipeline

data, folder, index, count, steps, every, pause = json.loads(sys.argv[1])
notes = [int(f.read_text()) for f in __import__("pathlib").Path(folder).glob("saved")]
step = notes[0] if notes else 0
pipeline = TrainPipeline(
    data, None, batch_size=8, seed=5, process_index=index, process_count=count, extra_fields=["id"]
)
with open(f"{folder}/ids.{count}.{index}.{step}.jsonl", "a") as log:
    for batch in pipeline.batches(step):
        if step == steps:
            break
        log.write(json.dumps([step, [name.decode() for name in batch["id"]]]) + "\\n")
        log.flush()
        step += 1
        if step % every == 0:
            with open(f"{folder}/at.{index}.new", "w") as note:
                note.write(str(step))
            os.replace(f"{folder}/at.{index}.new", f"{folder}/at.{index}")
        time.sleep(pause)
"""


def start(data, folder, processes, pause):
    def one(index):
        arguments = json.dumps([data, str(folder), index, processes, STEPS, EVERY, pause])
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-c", READER, arguments]
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    return [one(index) for index in range(processes)]


def steps_noted(folder, processes):
    """The last step that every process has saved."""
    notes = [folder / f"at.{index}" for index in range(processes)]
    return min((int(note.read_text()) if note.exists() else 0) for note in notes)


def read(folder, found):
    """Takes up the ids that one job wrote; a line that was cut by the kill is not one."""
    parts = {}
    for log in folder.glob("ids.*"):
        index = int(log.name.split(".")[2])
        for line in log.read_text().splitlines():
            if line.endswith("]]"):
                step, ids = json.loads(line)
                parts.setdefault(step, {})[index] = ids
        log.unlink()
    count = 1 + max(index for part in parts.values() for index in part)
    for step, part in parts.items():
        if len(part) == count:
            whole = [name for index in sorted(part) for name in part[index]]
            assert found.setdefault(step, whole) == whole, f"step {step} was another before"


def killed_until_done(data, folder, kills, seed):
    """step -> ids of the global batch; jobs are killed `kills` times on 1, 2 and 4 processes."""
    rng = random.Random(seed)
    found = {}
    saved = 0
    for attempt in range(kills + 1):
        processes = (1, 2, 4, 2, 1, 4)[(attempt + seed) % 6]
        (folder / "saved").write_text(str(saved))
        last = attempt == kills
        jobs = start(data, folder, processes, 0 if last else 0.05)
        until = STEPS if last else min(STEPS - 4, saved + rng.randint(3, 9))
        while not last and steps_noted(folder, processes) < until:
            assert all(job.poll() is None for job in jobs)
            time.sleep(0.01)
        for job in jobs:
            if not last:
                job.send_signal(signal.SIGKILL)
            assert job.wait(timeout=120) == (0 if last else -signal.SIGKILL)
        saved = steps_noted(folder, processes)
        read(folder, found)
        for note in folder.glob("at.*"):
            note.unlink()
    return found


def check(kind, tmp_path, kills):
    data = corpora.config(kind, tmp_path, corpora.examples(COUNT), lanes=4, window=2)
    if kind == "arrays":
        data["arrays"] = {"id": data["arrays"]["id"], "label": data["arrays"]["label"]}
        data["preprocess"] = {}
    straight = tmp_path / "straight"
    straight.mkdir()
    undisturbed = killed_until_done(data, straight, 0, 0)
    assert sorted(undisturbed) == list(range(STEPS))
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    assert killed_until_done(data, disturbed, kills, seed=1) == undisturbed


@pytest.mark.slow  # tests/training/test_resume.py kills a whole run
def test_killed_and_resumed_on_other_processes(tmp_path):
    check("webdataset", tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(corpora.WRITERS))
def test_killed_five_times(kind, tmp_path):
    check(kind, tmp_path, kills=5)
