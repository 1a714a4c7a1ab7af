"""The faults of tools.perf.fault_drill. Each disturbs a run and returns a few words about it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable

from tools.perf.fault_run import CHECKPOINT_EVERY, WATCHDOG, Run

Fault = Callable[[Run, random.Random], str]


@dataclasses.dataclass(frozen=True)
class Round:
    """The outcome of a fault.

    Attributes:
      step: when it happened.
      seconds: from then until the run was past that step.
      checkpoints: steps of those that were whole before it.
      resumed: the step that a restart went on from; None if there was none.
      statuses: how the processes ended.
    """

    number: int
    fault: str
    step: int
    note: str
    seconds: float
    checkpoints: list[int]
    resumed: int | None
    statuses: list[int]


def kill_one(run: Run, rng: random.Random) -> str:
    """SIGKILL for one process."""
    attempt, pids = run.attempt(), run.pids()
    which = rng.randrange(len(pids))
    os.kill(pids[which], signal.SIGKILL)
    _wait_for_restart(run, attempt)
    return f"process {which}"


def kill_all(run: Run, rng: random.Random) -> str:
    """SIGKILL for all processes."""
    attempt = run.attempt()
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    _wait_for_restart(run, attempt)
    return "all processes"


def sigterm(run: Run, rng: random.Random) -> str:
    """SIGTERM for one process, as a scheduler sends it: all of them save and end."""
    attempt, pids = run.attempt(), run.pids()
    which = rng.randrange(len(pids))
    os.kill(pids[which], signal.SIGTERM)
    _wait_for_restart(run, attempt)
    return f"to process {which}"


def sigstop(run: Run, rng: random.Random) -> str:
    """SIGSTOP for one process, until the watchdog of another has ended the job."""
    attempt, pids = run.attempt(), run.pids()
    which = rng.randrange(len(pids))
    os.kill(pids[which], signal.SIGSTOP)
    # In the middle of a save they wait for as long as a save may take.
    seconds = 60 * max(WATCHDOG["step_minutes"], WATCHDOG["pause_minutes"]) + 20
    _wait_for_restart(run, attempt, seconds)
    with contextlib.suppress(ProcessLookupError):  # the launcher has killed it
        os.kill(pids[which], signal.SIGCONT)
    return f"process {which}" + ("" if run.attempt() > attempt else ", nobody noticed")


def truncate(run: Run, rng: random.Random) -> str:
    """Cuts the largest file of the newest checkpoint, and kills the job to have it read."""
    attempt = run.attempt()
    for pid in run.pids():  # so that no newer one comes between
        os.kill(pid, signal.SIGSTOP)
    step = run.checkpoints()[-1]
    folder = run.workdir / "checkpoints" / str(step)
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    for pid in run.pids():
        os.kill(pid, signal.SIGKILL)
    _wait_for_restart(run, attempt)
    return f"checkpoint {step}"


def disk_full(run: Run, rng: random.Random) -> str:
    """Fills the disk of the workdir for the time of two saves."""
    filler = run.workdir.parent / "filler"
    before = run.output().count("could not be saved")
    # Unbuffered: the error has to come from this write, not from a later close.
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 16))
    until = time.monotonic() + 120
    while run.output().count("could not be saved") < before + 2 and time.monotonic() < until:
        time.sleep(0.05)
    filler.unlink()
    failed = run.output().count("could not be saved") - before
    time.sleep(CHECKPOINT_EVERY * 0.05)
    return f"{failed} saves failed"


def nan(run: Run, rng: random.Random) -> str:
    """Makes the parameters of all processes NaN."""
    attempt, step = run.attempt(), run.step() + 4
    file = run.home / "nan_at"
    file.write_text(str(step))
    _wait_for_restart(run, attempt)
    file.unlink()
    return f"before step {step}"


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (kill_one, kill_all, sigterm, sigstop, truncate, disk_full, nan)
}


def _wait_for_restart(run: Run, attempt: int, seconds: float = 300) -> None:
    """Returns when the launcher has begun the next attempt, or the time is up."""
    until = time.monotonic() + seconds
    while run.attempt() == attempt and time.monotonic() < until:
        time.sleep(0.05)
