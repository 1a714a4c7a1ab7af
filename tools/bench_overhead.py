"""What there is around the steps of a run, on a CPU: compiling, starting again, work of the host.

python -m tools.bench_overhead [--json FILE] [--rounds N] [--steps N] [--part compile|warm|host ...]
    [--steps-per-dispatch N ...]

compile: seconds to trace and compile the step at 6, 12 and 24 layers of the same width, cold, in
turns; layers are one scan, so the ratio to 6 layers should stay near 1. warm: the same in processes
of their own, with an empty and with a filled persistent cache. host: what the main thread computes
for a step of the real loop (time.thread_time: waiting is not counted), with as many arrays and
layers as the config's model has, logged as often, and a width that a CPU can hold, for each number
of steps that the devices are handed in one program (config.steps_per_dispatch). That the step
itself does not run inside of this thread is seen from the CPU time of all others, told beside it.

Sizes other than depth are those of a smoke test; nothing here says how fast a step is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.arguments import check_arguments
from vlp_jax.errors import UserError
from vlp_jax.models.variants import size_of
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.observe.profiler import NullProfiler
from vlp_jax.observe.progress import NullProgress
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.observe.watchdog import NullWatchdog
from vlp_jax.observe.writers import Writer, build_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch
from vlp_jax.planning.options import sections
from vlp_jax.planning.variants import TOWERS, with_depth
from vlp_jax.train import make_step_clock
from vlp_jax.training.abstract_setup import abstract_setup
from vlp_jax.training.command import run_command
from vlp_jax.training.init_from import FromSeed
from vlp_jax.training.loop import Loop
from vlp_jax.training.measures import NullMeasures
from vlp_jax.training.report import StepReport
from vlp_jax.training.setup import Setup
from vlp_jax.training.step import compile_step
from vlp_jax.training.when import StepsAhead

DEPTHS = (6, 12, 24)
PARTS = ("compile", "warm", "host")
WARM_UP = 5  # steps that are not counted


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="configs/clip_l14.py", help="whose arrays and layers to take")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    add("--rounds", type=int, default=3, help="turns of each")
    add("--steps", type=int, default=200, help="steps of a turn of the loop")
    add(
        "--steps-per-dispatch",
        type=int,
        nargs="+",
        default=(1, 10),
        metavar="N",
        help="steps in a program, each measured in turns (default: 1 and 10)",
    )
    add("--json", metavar="FILE", help="also write the figures there")
    add("--compile-once", type=int, metavar="DEPTH", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    check_arguments(arguments, "rounds", "steps", "steps_per_dispatch")
    return arguments


def narrow_config(file: str, depth: int | None) -> ConfigDict:
    """The config with the sizes of a smoke test, but for its layers: `depth`, or its own."""
    config = config_lib.load(file)
    small = smoke_lib.smoke(config).unlock()
    small.mesh = config_lib.base().mesh
    small.log.every = config.log.every
    small.duration.steps = 1_000_000
    if depth:
        return with_depth(small, depth)
    for narrow, wide in zip(sections(small), sections(config), strict=True):
        for tower in (name for name in TOWERS if isinstance(wide.get(name), ConfigDict)):
            narrow[tower].depth = _depth_of(wide[tower]) or narrow[tower].depth
    return small


def _depth_of(tower: ConfigDict) -> int | None:
    """Its layers; None where the section leaves them to the model."""
    size, own = tower.get("variant", "").partition("/")[0], tower.get("depth")
    return size_of(size, depth=own).depth if size else own


def make_narrow_setup(file: str, depth: int | None) -> Setup:
    """Its setup on the CPU devices of this process."""
    config = narrow_config(file, depth)
    return abstract_setup(config, mesh_lib.make_mesh(config.mesh))


def compile_seconds(setup: Setup) -> tuple[float, float]:
    """(to trace and compile the step, of this in XLA or in reading its cache)."""
    begin = time.perf_counter()
    with CompileWatch() as watch:
        compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
    return time.perf_counter() - begin, watch.so_far().seconds


def measure_depths(file: str, rounds: int) -> dict[str, Any]:
    """Medians of cold compilations, the depths in turns."""
    jax.config.update("jax_enable_compilation_cache", False)
    setups = {depth: make_narrow_setup(file, depth) for depth in DEPTHS}
    times: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(rounds):
        for depth, setup in setups.items():
            jax.clear_caches()
            times[depth].append(compile_seconds(setup)[0])
    medians = {depth: statistics.median(found) for depth, found in times.items()}
    return {f"seconds_{depth}_layers": found for depth, found in medians.items()} | {
        f"ratio_{depth}_layers": statistics.median(
            [a / b for a, b in zip(times[depth], times[DEPTHS[0]], strict=True)]
        )
        for depth in DEPTHS
    }


def measure_warm_start(file: str, rounds: int) -> dict[str, Any]:
    """Compilation in fresh processes, first with an empty cache and then with what it left."""
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                found[state].append(_in_new_process(file, cache))
    ratios = [w[0] / c[0] for w, c in zip(found["warm"], found["cold"], strict=True)]
    in_xla = [w[1] / c[1] for w, c in zip(found["warm"], found["cold"], strict=True)]
    return {
        **{f"seconds_{k}": statistics.median(t for t, _ in v) for k, v in found.items()},
        "ratio": statistics.median(ratios),
        "ratio_without_tracing": statistics.median(in_xla),
    }


def _in_new_process(file: str, cache: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "tools.bench_overhead", "--config", str(Path(file).resolve())]
    command += ["--compile-once", str(DEPTHS[-1])]
    variables = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=root)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


class NullCheckpointer:
    """Saves nothing."""

    failed = 0

    def poll(self) -> None:
        """There is nothing to look at."""


@dataclasses.dataclass
class Spent:
    """CPU seconds of the calling thread in one part of the loop."""

    seconds: float = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its CPU time counted here."""

        def call(*arguments: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.thread_time() - begin

        return call


def measure_host(
    file: str, rounds: int, steps: int, together: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """CPU time of the main thread for a step of the real loop: medians over the rounds.

    Args:
      together: numbers of steps in a program; they take turns.
    """
    setup = make_narrow_setup(file, None)
    runs = {number: HostRun(_with_dispatch(setup, number)) for number in together}
    rows: dict[int, list[dict[str, float]]] = {number: [] for number in together}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for number, run in runs.items():
                rows[number].append(run(steps if turn else WARM_UP * number, epath.Path(folder)))
    leaves = len(jax.tree.leaves(setup.abstract))
    return {
        f"host_{number}_a_dispatch": {
            name: statistics.median(row[name] for row in found[1:]) for name in found[0]
        }
        | {"arrays_of_the_state": leaves}
        for number, found in rows.items()
    }


def _with_dispatch(setup: Setup, number: int) -> Setup:
    config = setup.config.copy_and_resolve_references().unlock()
    config.steps_per_dispatch = number
    return dataclasses.replace(setup, config=config)


def _make_report(
    setup: Setup, writer: Writer, clock: StepClock, startup: StartupClock
) -> StepReport:
    return StepReport(
        log_when=setup.log_when(),
        batch_size=setup.config.batch_size,
        writer=writer,
        progress=NullProgress(),
        clock=clock,
        startup=startup,
        input_metrics=lambda step: {},
        measures=NullMeasures(),
        max_skipped=setup.config.guard.max_skipped,
        keep_examples=lambda steps: epath.Path(),
    )


class HostRun:
    """The real loop on one batch that lies on the devices, a turn at a time."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._program = setup.compile()
        self._state = FromSeed().state(setup)
        fields = {name: np.zeros(s.shape, s.dtype) for name, s in setup.batch_spec.items()}
        self._batch = put_batch(fields, setup.mesh)
        self._at = 0

    def __call__(self, steps: int, folder: epath.Path) -> dict[str, float]:
        """Trains `steps` more; microseconds of a step by part."""
        first, self._at = self._at, self._at + steps
        startup = StartupClock()
        clock = make_step_clock(self._setup, startup)
        writer = build_writers(self._setup.config.writers, folder, first, {})
        report = _make_report(self._setup, writer, clock, startup)
        dispatch, reporting = Spent(), Spent()
        report.take = reporting.timed(report.take)
        loop = self._loop(dispatch.timed(self._program), first, report, writer, clock)
        begin, whole = time.thread_time(), time.process_time()
        self._state = loop.run(self._state)
        own = time.thread_time() - begin
        report.settle()
        jax.block_until_ready(self._state)
        others = time.process_time() - whole - (time.thread_time() - begin)
        clock.finish()
        writer.close()
        seconds = {
            "host": own,
            "dispatch": dispatch.seconds,
            "report": reporting.seconds,
            "rest": own - dispatch.seconds - reporting.seconds,
            "other_threads": others,
        }
        return {f"{k}_microseconds": v / steps * 1e6 for k, v in seconds.items()}

    def _loop(
        self,
        program: Callable[..., Any],
        first: int,
        report: StepReport,
        writer: Writer,
        clock: StepClock,
    ) -> Loop:
        """Up to where this turn ends, with everything off that a step in the middle does not do."""
        log_when = self._setup.log_when()
        return Loop(
            program_of=lambda step: program,
            batches=iter(lambda: self._batch, None),
            input_state=lambda step: {},
            first_step=first,
            last_step=self._at,
            save_when=lambda step: False,
            evaluations=(),
            one_evaluation=contextlib.nullcontext,
            preempted=lambda step: False,
            log_when=log_when,
            report=report,
            checkpointer=NullCheckpointer(),
            writer=writer,
            progress=NullProgress(),
            clock=clock,
            profiler=NullProfiler(),
            watchdog=NullWatchdog(),
            measures=NullMeasures(),
            steps_ahead=StepsAhead(
                several=self._setup.config.steps_per_dispatch,
                first=0,
                last=self._at,
                begins=(log_when,),
            ),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""

    def command() -> None:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        jax.config.update("jax_platforms", "cpu")
        # Else a step would be computed within its dispatch, and count as work of the host.
        jax.config.update("jax_cpu_enable_async_dispatch", True)
        if arguments.compile_once:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            setup = make_narrow_setup(arguments.config, arguments.compile_once)
            print(json.dumps(compile_seconds(setup)))
            return
        file, rounds = arguments.config, arguments.rounds
        measured = {
            "host": lambda: measure_host(
                file, rounds, arguments.steps, arguments.steps_per_dispatch
            ),
            "warm": lambda: {"warm": measure_warm_start(file, rounds)},
            "compile": lambda: {"compile": measure_depths(file, rounds)},
        }
        found = {}
        for part in (name for name in measured if name in arguments.part):
            for title, figures in measured[part]().items():
                found[title] = figures
                print(f"{title.replace('_', ' ')}:")
                for name, value in figures.items():
                    print(f"  {name.replace('_', ' '):<28} {value:.4g}")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
