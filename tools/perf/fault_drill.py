"""Disturbs a run of two processes in every known way, and compares its end.

    python -m tools.perf.fault_drill --output drill

First a run that nobody disturbs, then the same run with a fault a round: processes are killed,
stopped, told to stop, a checkpoint is truncated, the disk is filled, parameters become NaN. Both
go through launch/local.sh, which starts again what ended. In the end all losses and parameters have
to equal the undisturbed run's, bit for bit, and no whole checkpoint may have been lost.

The exit status is 1 if anything differs. A full disk needs a small file system of its own, which is
mounted (root, Linux); where that is not allowed, the other faults are drawn and the table says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.perf import harness
from tools.perf.fault_run import WATCHDOG, Run
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError

STEPS_A_ROUND = 30
DISK_MIB = 48
HEADS = (
    *("round", "fault", "at step", "went on from", "steps again", "seconds lost"),
    *("statuses", "note"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("fault_drill", __doc__, rounds=20)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="a new folder for both runs")
    add("--processes", type=int, default=2, metavar="N", help="of the job (default: 2)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of faults and times")
    add("--faults", metavar="A,B", help=f"kinds to draw from (default: all): {', '.join(FAULTS)}")
    return parse_with_overrides(parser, argv, "processes", "rounds")[0]


def send(number: signal.Signals, *, everyone: bool = False, seconds: float = 300) -> Callable:
    """Returns a fault: a signal for one process or for all."""

    def fault(run: Run, rng: random.Random) -> str:
        attempt, pids = run.attempt(), run.pids()
        which = rng.randrange(len(pids))
        for pid in pids if everyone else pids[which : which + 1]:
            os.kill(pid, number)
        noticed = run.wait_for_restart(attempt, seconds)
        if number == signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):  # the launcher has killed it
                os.kill(pids[which], signal.SIGCONT)
        told = "all processes" if everyone else f"process {which}"
        return told if noticed else f"{told}, nobody noticed"

    return fault


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
    run.wait_for_restart(attempt)
    return f"checkpoint {step}"


def disk_full(run: Run, rng: random.Random) -> str:
    """Fills the disk of the workdir for the time of two saves."""
    filler, told = run.workdir.parent / "filler", "could not be saved"
    before = run.output().count(told)
    # Unbuffered: the error has to come from this write, not from a later close.
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * (1 << 16))
    until = time.monotonic() + 120
    while run.output().count(told) < before + 2 and time.monotonic() < until:
        time.sleep(0.05)
    filler.unlink()
    return f"{run.output().count(told) - before} saves failed"


def nan(run: Run, rng: random.Random) -> str:
    """Makes the parameters of all processes NaN."""
    attempt, step = run.attempt(), run.step() + 4
    file = run.home / "nan_at"
    file.write_text(str(step))
    run.wait_for_restart(attempt)
    file.unlink()
    return f"before step {step}"


# In the middle of a save the others wait for as long as a save may take.
_WATCHED = 60 * max(WATCHDOG["step_minutes"], WATCHDOG["pause_minutes"]) + 20
FAULTS: dict[str, Callable[[Run, random.Random], str]] = {
    "kill_one": send(signal.SIGKILL),
    "kill_all": send(signal.SIGKILL, everyone=True),
    "sigterm": send(signal.SIGTERM),
    "sigstop": send(signal.SIGSTOP, seconds=_WATCHED),
    "truncate": truncate,
    "disk_full": disk_full,
    "nan": nan,
}


def choose(names: str | None, rounds: int, rng: random.Random) -> list[str]:
    """Draws a kind of fault for each round, each kind as often as the others, in random order.

    Raises:
      UserError: a kind that is not known.
    """
    known = names.split(",") if names else list(FAULTS)
    harness.check_names(known, FAULTS, "--faults")
    drawn = [known[i % len(known)] for i in range(rounds)]
    # Each kind as often, so that a short drill has them all.
    rng.shuffle(drawn)
    return drawn


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Mounts a small file system at `directory`; gives False where that is not allowed."""
    directory.mkdir(parents=True)
    # Filling the real disk would stop everybody else on the machine.
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def disturb(run: Run, fault: str, rng: random.Random) -> dict[str, Any]:
    """Waits for a random step, lets the fault happen, and waits until the run is past it."""
    # A few steps later: between, before and after saves alike.
    run.wait_for_step(run.step() + rng.randint(6, 20))
    before, attempt, at, began = run.checkpoints(), run.attempt(), run.step(), time.monotonic()
    note = FAULTS[fault](run, rng)
    run.wait_for_step(max(at, run.step()) + 1)
    return {
        "fault": fault,
        "step": at,
        "note": note,
        "seconds": time.monotonic() - began,
        "checkpoints": before,  # whole ones
        "resumed": run.resumed_at() if run.attempt() > attempt else None,
        "statuses": run.statuses(attempt),
    }


def problems(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Finds whole checkpoints that the run did not go on from, and hangs that nobody noticed."""
    found = []
    for number, done in enumerate(rounds, 1):
        fault, resumed = done["fault"], done["resumed"]
        if fault == "sigstop" and resumed is None:
            found.append(f"round {number}: a process was stopped and nobody noticed")
        # The truncated one is the newest, and must not be taken.
        whole = done["checkpoints"][:-1] if fault == "truncate" else done["checkpoints"]
        if resumed is not None and whole and resumed < whole[-1]:
            found.append(
                f"round {number} ({fault}): went on from step {resumed}, although the checkpoint "
                f"of step {whole[-1]} was whole"
            )
    return found


def differences(quiet: Run, disturbed: Run) -> list[str]:
    """Returns the differences between the ends of two runs, in words."""
    found = []
    one, other = quiet.losses(), disturbed.losses()
    if one.keys() != other.keys():
        found.append(f"{len(one)} numbers were logged, and {len(other)} in the disturbed run")
    unequal = sorted(key for key in one.keys() & other.keys() if one[key] != other[key])
    if unequal:
        step, name = unequal[0]
        found.append(f"{name} differs from step {step} on ({len(unequal)} of {len(one)} numbers)")
    a, b = quiet.parameters(), disturbed.parameters()
    if a.keys() != b.keys():
        found.append("the last checkpoints hold other arrays")
    wrong = [name for name in a.keys() & b.keys() if not np.array_equal(a[name], b[name])]
    if wrong:
        found.append(f"{len(wrong)} of {len(a)} arrays of the last checkpoint differ: {wrong[0]}")
    return found


def rows_of(rounds: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the cells of each round, below `HEADS`."""
    rows = []
    for number, done in enumerate(rounds, 1):
        resumed = done["resumed"]
        again = 0 if resumed is None else max(0, done["step"] - resumed)
        cells = [number, done["fault"], done["step"], "-" if resumed is None else resumed, again]
        cells += [f"{done['seconds']:.1f}", " ".join(map(str, done["statuses"])), done["note"]]
        rows.append([str(cell) for cell in cells])
    return rows


def drill(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs both; returns the rounds, and a line for each thing that is wrong.

    Raises:
      UserError: the folder exists, or arguments that cannot be used.
    """
    rng = random.Random(arguments.seed)
    kinds = choose(arguments.faults, arguments.rounds, rng)
    output = Path(arguments.output).resolve()
    if output.exists():
        raise UserError(f"--output {output} exists already; give a new folder")
    steps = STEPS_A_ROUND * (arguments.rounds + 1)
    quiet = Run(output / "quiet", output / "quiet" / "run", arguments.processes, steps)
    print(f"the undisturbed run: {steps} steps", flush=True)
    with quiet.started():
        quiet.wait_for_end()
    with small_disk(output / "disk") as mounted:
        if not mounted:
            print("note: no file system could be mounted here: the disk is never full")
            others = [kind for kind in FAULTS if kind != "disk_full"]
            kinds = [kind if kind != "disk_full" else rng.choice(others) for kind in kinds]
        run = Run(output / "disturbed", output / "disk" / "run", arguments.processes, steps)
        rounds = []
        with run.started():
            run.wait_for_step(1)
            for number, kind in enumerate(kinds, start=1):
                print(f"round {number} of {len(kinds)}: {kind}", flush=True)
                rounds.append(disturb(run, kind, rng))
            run.wait_for_end()
        wrong = differences(quiet, run) + problems(rounds)
        logged = len({step for step, name in run.losses() if name == "train/loss"})
        if logged != steps:
            wrong.append(f"{logged} of {steps} steps are in metrics.jsonl")
    return rounds, wrong


def command(argv: list[str]) -> int:
    """Runs the drill and prints the table; returns 1 if anything is wrong."""
    arguments = parse(argv)
    rounds, wrong = drill(arguments)
    table = harness.make_table("faults, and the cost of each", HEADS, rows_of(rounds))
    harness.make_console().print(table)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if not wrong:
        print(
            f"{len(rounds)} faults: losses and parameters equal the undisturbed run's, bit for "
            "bit, and no whole checkpoint was lost"
        )
    harness.write_json(arguments.json, "fault_drill", argv, {"rounds": rounds, "wrong": wrong})
    return int(bool(wrong))


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
