"""The harness of all measurements: arguments, rounds in turns, ratios, provenance, JSON, tables.

A measurement is a module with `command(argv)`; `main_of` makes its `main`. JAX is imported by
need: worker processes of PyTorch import a measurement's module and have no use for JAX.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from vlp_jax import arguments as arguments_lib
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.versions import commit, versions

T = TypeVar("T")
GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy"),
    *("tensorflow-cpu", "tensorflow", "array_record", "pillow", "webdataset"),
    *("torch", "timm", "transformers", "open_clip_torch"),
)
VARIABLES = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "PJRT_NPROC", "GLIBC_TUNABLES")
PLAIN_WIDTH = 140  # of a table where there is no terminal: wide enough to wrap nothing


def make_parser(
    name: str, description: str | None, *, config: bool | None = None, rounds: int | None = None
) -> argparse.ArgumentParser:
    """Returns a parser with --json.

    Args:
      name: of the measurement in `tools.perf`, or a module in full.
      config: adds --config and --config.KEY=VALUE; True requires --config.
      rounds: the default of --rounds; None leaves it out.
    """
    parser = arguments_lib.make_parser(_command(name), description, config=config)
    if rounds is not None:
        told = "turns of each (default: %(default)s)"
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=told)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    return parser


def _command(name: str) -> str:
    return f"python -m {name if '.' in name else f'tools.perf.{name}'}"


def main_of(command: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Returns `main(argv=None)` of a measurement: its exit status is 0 where `command` gives None.

    Args:
      command: is given the arguments, by default of this process.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        from vlp_jax.training.command import run_command

        given = list(sys.argv[1:] if argv is None else argv)
        statuses: list[int] = []
        # Empty if the command raised: then `run_command` has the status.
        return run_command(lambda: statuses.append(command(given) or 0)) or statuses[0]

    return main


def check_names(names: Iterable[str], known: Iterable[str], option: str) -> None:
    """Raises UserError for the first of `names` that is not known, with the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(unknown_key_message(name, known, option))


def start_run() -> None:
    """Starts JAX as a training run does: its processes and the cache of compiled programs."""
    from vlp_jax.parallel import startup

    startup.initialize()
    startup.use_compilation_cache()


def in_turns(
    turns: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    rotate: bool = True,
    before: Callable[[int, str], None] = lambda number, name: None,
) -> dict[str, list[T]]:
    """Calls each function once a round; returns the results of each, a list by round.

    A change in the speed of the machine meets all of them.

    Args:
      rotate: another one begins each round, so that none always follows the same.
      before: is told the round, from 0, and the name whose turn it is.
    """
    results: dict[str, list[T]] = {name: [] for name in turns}
    # The next in turn starts a round: caches and clocks favour no place.
    names = list(turns)
    for number in range(rounds):
        first = number % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            before(number, name)
            results[name].append(turns[name]())
    return results


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Ratios of two measurements, one a round: both halves met the same machine."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    def as_json(self) -> dict[str, Any]:
        """The median, the least, the greatest, and the ratio of each round."""
        ends = {"min": min(self.rounds), "max": max(self.rounds)}
        return {"median": self.median, **ends, "rounds": list(self.rounds)}

    def __format__(self, form: str) -> str:
        ends = f"{min(self.rounds):{form}} to {max(self.rounds):{form}}"
        return f"{self.median:{form}} ({ends})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Returns numerator over denominator of each round."""
    return Ratio(tuple(a / b for a, b in zip(numerators, denominators, strict=True)))


def seconds(function: Callable[[], object]) -> float:
    """Returns the wall time of one call, which has to wait for what it starts."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class StepTimer:
    """Times steps that the host starts ahead of the device, as the training loop does.

    The next step is started before the end of this one is waited for.

    Args:
      wait: returns when a result is there.
      ahead: steps that are started before one is waited for; 0 where starting a step is doing it.
    """

    def __init__(self, wait: Callable[[Any], None], ahead: int = 1):
        self._wait, self._ahead = wait, ahead
        self._marks = [time.perf_counter()]
        self._pending: list[Any] = []

    def started(self, result: Any) -> None:
        """Notes that a step was started; `result` is there when it ends."""
        self._pending.append(result)
        if len(self._pending) > self._ahead:
            self._end_one()

    def seconds(self) -> list[float]:
        """Waits for all; returns the seconds from the end of a step to the end of the next."""
        while self._pending:
            self._end_one()
        return [end - begin for begin, end in zip(self._marks, self._marks[1:], strict=False)]

    def _end_one(self) -> None:
        self._wait(self._pending.pop(0))
        self._marks.append(time.perf_counter())


def provenance(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Returns all that is needed to measure the same again: command, date, versions, machine.

    Devices are told where JAX has been imported: asking for them would start it.
    """
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "command": f"{_command(name)} {shlex.join(argv)}".strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(PACKAGES),
        "machine": {
            "cpu": models[0] if models else platform.processor(),
            "system": platform.platform(),
            # Of a container or under taskset fewer than os.cpu_count().
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    jax = sys.modules.get("jax")
    # Benchmarks of data alone may not have imported it.
    if jax is not None:
        device = jax.local_devices()[0]
        found |= {"device_kind": device.device_kind, "device_platform": device.platform}
        found["host_devices"] = jax.local_device_count()
    return found


def write_json(
    file: str | Path | None, name: str, argv: Sequence[str], content: Mapping[str, Any]
) -> None:
    """Writes `content` with its provenance to `file`; None writes nothing.

    Args:
      name: of the measurement, see `make_parser`.
      argv: its arguments.
    """
    if file:
        text = json.dumps({**provenance(name, argv), **content}, indent=2)
        Path(file).write_text(text + "\n")


def make_console() -> Console:
    """Returns a console on stdout, as wide as the terminal or as a table needs."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def make_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for a terminal: the first column to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table for a page: columns from number `left` on have figures, to the right."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
