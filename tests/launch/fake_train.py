"""Stands in for `python -m vlp_jax.train` under the launchers: does what FAKE_PLAN says.

FAKE_PLAN is JSON: for each attempt, for each process, a list of actions that are done in order:
["save", STEP], ["exit", STATUS], ["sleep", SECONDS], ["stop"] (SIGSTOP to itself),
["crash"] (SIGABRT), ["on_term", STATUS, STEP or null] (the handler of SIGTERM), ["wait_for", FILE],
["touch", FILE].
Attempts are counted in WORKDIR by process; the last attempt of the plan is repeated.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--workdir", type=Path, required=True)
parser.add_argument("--process-id", type=int, default=0)
parser.add_argument("--expect-processes", type=int)
arguments, rest = parser.parse_known_args()
workdir, process = arguments.workdir, arguments.process_id
workdir.mkdir(parents=True, exist_ok=True)

counter = workdir / f"attempts.{process}"
attempt = int(counter.read_text()) if counter.exists() else 0
counter.write_text(str(attempt + 1))
with (workdir / f"arguments.{process}").open("a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}) + "\n")

plan = json.loads(os.environ["FAKE_PLAN"])
actions = plan[min(attempt, len(plan) - 1)][process]


def save(step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


def on_term(status, step):
    def handle(*_):
        if step is not None:
            save(step)
        print("told to stop", flush=True)
        os._exit(status)

    signal.signal(signal.SIGTERM, handle)


print(f"attempt {attempt} of process {process}", flush=True)
for name, *values in actions:
    if name == "save":
        save(*values)
    elif name == "exit":
        os._exit(*values)
    elif name == "sleep":
        time.sleep(*values)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    elif name == "on_term":
        on_term(*values)
    elif name == "touch":
        (workdir / values[0]).touch()
    elif name == "wait_for":
        while not (workdir / values[0]).exists():
            time.sleep(0.02)
    else:
        raise ValueError(name)
