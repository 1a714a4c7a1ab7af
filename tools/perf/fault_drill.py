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
import dataclasses
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.perf import harness
from tools.perf.fault_kinds import FAULTS, Fault, Round
from tools.perf.fault_run import DISK_MIB, Run, steps_of
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError, unknown_key_message

STEPS_A_ROUND = 30
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
    return parse_with_overrides(parser, argv, "processes")[0]


def choose(names: str | None, rounds: int, rng: random.Random) -> list[str]:
    """Draws a kind of fault for each round, each kind as often as the others, in random order.

    Raises:
      UserError: a kind that is not known, or no rounds.
    """
    known = names.split(",") if names else list(FAULTS)
    for name in known:
        if name not in FAULTS:
            raise UserError(unknown_key_message(name, FAULTS, "--faults"))
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    drawn = [known[i % len(known)] for i in range(rounds)]
    # Each kind as often, so that a short drill has them all.
    rng.shuffle(drawn)
    return drawn


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Mounts a small file system at `directory`; gives False where that is not allowed."""
    directory.mkdir(parents=True)
    size = f"size={DISK_MIB}m"
    # Filling the real disk would stop everybody else on the machine.
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], check=True)


@dataclasses.dataclass
class Drill:
    """Disturbs a run, a fault a round."""

    run: Run
    rng: random.Random
    console: Console

    def disturb(self, number: int, fault: Fault) -> Round:
        """Waits for a random step, lets the fault happen, and waits until the run is past it."""
        # A few steps later: between, before and after saves alike.
        target = self.run.step() + self.rng.randint(6, 20)
        self.run.wait_for_step(target)
        before, attempt = self.run.checkpoints(), self.run.attempt()
        began = time.monotonic()
        self.console.print(f"round {number}: {fault.__name__} at step {self.run.step()}")
        at = self.run.step()
        note = fault(self.run, self.rng)
        self.run.wait_for_step(max(at, self.run.step()) + 1)
        lost = time.monotonic() - began
        return Round(
            number=number,
            fault=fault.__name__,
            step=at,
            note=note,
            seconds=lost,
            checkpoints=before,
            resumed=self.run.resumed_at() if self.run.attempt() > attempt else None,
            statuses=self.run.statuses(attempt),
        )


def problems(rounds: Sequence[Round]) -> list[str]:
    """Finds whole checkpoints that the run did not go on from, and hangs that nobody noticed."""
    found = []
    for done in rounds:
        if done.fault == "sigstop" and done.resumed is None:
            found.append(f"round {done.number}: a process was stopped and nobody noticed")
        # The truncated one is the newest, and must not be taken.
        whole = done.checkpoints[:-1] if done.fault == "truncate" else done.checkpoints
        if done.resumed is not None and whole and done.resumed < whole[-1]:
            found.append(
                f"round {done.number} ({done.fault}): went on from step {done.resumed}, although "
                f"the checkpoint of step {whole[-1]} was whole"
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


def table(rounds: Sequence[Round]) -> Table:
    """Returns a table with a row for each round."""
    rows = []
    for done in rounds:
        resumed = "-" if done.resumed is None else str(done.resumed)
        again = "0" if done.resumed is None else str(max(0, done.step - done.resumed))
        cells = (str(done.number), done.fault, str(done.step), resumed, again)
        rows.append((*cells, f"{done.seconds:.1f}", " ".join(map(str, done.statuses)), done.note))
    return harness.make_table("faults, and the cost of each", HEADS, rows)


def drill(arguments: argparse.Namespace, console: Console) -> tuple[list[Round], list[str]]:
    """Runs both; returns the rounds, and a line for each thing that is wrong.

    Raises:
      UserError: the folder exists, or arguments that cannot be used.
    """
    rng = random.Random(arguments.seed)
    kinds = choose(arguments.faults, arguments.rounds, rng)
    output = Path(arguments.output).resolve()
    if output.exists():
        raise UserError(f"--output {output} exists already; give a new folder")
    output.mkdir(parents=True)
    steps = STEPS_A_ROUND * (arguments.rounds + 1)
    quiet = Run(output / "quiet", output / "quiet" / "run", arguments.processes, steps)
    console.print(f"the undisturbed run: {steps} steps")
    with quiet.started():
        quiet.wait_for_end()
    with small_disk(output / "disk") as mounted:
        if not mounted:
            console.print("note: no file system could be mounted here: the disk is never full")
            others = [kind for kind in FAULTS if kind != "disk_full"]
            kinds = [kind if kind != "disk_full" else rng.choice(others) for kind in kinds]
        run = Run(output / "disturbed", output / "disk" / "run", arguments.processes, steps)
        rounds, each = [], Drill(run, rng, console)
        with run.started():
            run.wait_for_step(1)
            for number, kind in enumerate(kinds, start=1):
                rounds.append(each.disturb(number, FAULTS[kind]))
            run.wait_for_end()
        wrong = differences(quiet, run) + problems(rounds)
        if steps_of(run.losses()) != steps:
            wrong.append(f"{steps_of(run.losses())} of {steps} steps are in metrics.jsonl")
    return rounds, wrong


def command(argv: list[str]) -> int:
    """Runs the drill and prints the table; returns 1 if anything is wrong."""
    arguments = parse(argv)
    console = harness.make_console()
    rounds, wrong = drill(arguments, console)
    console.print(table(rounds))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if not wrong:
        console.print(
            f"{len(rounds)} faults: losses and parameters equal the undisturbed run's, "
            "bit for bit, and no whole checkpoint was lost"
        )
    record = {"rounds": [dataclasses.asdict(r) for r in rounds], "wrong": wrong}
    harness.write_json(arguments.json, "fault_drill", argv, record)
    return int(bool(wrong))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
