"""The cost around the steps of a run, on a CPU: compiling, starting again, work of the host.

python -m tools.perf.overhead [--rounds N] [--steps N] [--part compile|warm|host ...]
    [--steps-per-dispatch N ...]

compile: seconds to trace and compile the step at 6, 12 and 24 layers of the same width, cold, in
turns; layers are one scan, so the ratio to 6 layers should stay near 1. warm: the same in processes
of their own, with an empty and with a filled persistent cache. host: CPU time of the main thread
for a step of the real loop (time.thread_time: waiting is not counted), with as many arrays and
layers as the config's model has, logged as often, and a width that a CPU can hold, for each number
of steps that the devices are handed in one program (config.steps_per_dispatch). The CPU time of all
other threads is told beside it: it shows that the step does not run inside of this thread.

Sizes other than depth are a smoke test's; nothing here says how fast a step is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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

from tools.perf import harness
from tools.perf.loop import LoopRunner
from tools.perf.variants import TOWERS, with_depth
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.models.variants import size_of
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.observe.writers import build_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch
from vlp_jax.planning.options import sections
from vlp_jax.training.abstract_setup import abstract_setup
from vlp_jax.training.monitor import make_step_clock
from vlp_jax.training.setup import Setup
from vlp_jax.training.step import compile_step

DEPTHS = (6, 12, 24)
PARTS = ("compile", "warm", "host")
WARM_UP = 5  # steps that are not counted


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("overhead", __doc__, rounds=3)
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", default="clip_l14", help="gives arrays and layers")
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)")
    add("--steps", type=int, default=200, metavar="N", help="steps of a turn of the loop")
    add(
        "--steps-per-dispatch",
        type=int,
        nargs="+",
        default=(1, 10),
        metavar="N",
        help="steps in a program, each measured in turns (default: 1 and 10)",
    )
    add("--compile-once", type=int, metavar="DEPTH", help=argparse.SUPPRESS)
    return parse_with_overrides(parser, argv, "rounds", "steps", "steps_per_dispatch")[0]


def narrow_config(file: str, depth: int | None) -> ConfigDict:
    """Returns the config with the sizes of a smoke test, and `depth` layers or its own number."""
    config = config_lib.load(file)
    small = smoke_lib.smoke(config).unlock()
    # The config's mesh may be for a pod; here there are few devices.
    small.mesh = config_lib.base().mesh
    small.log.every = config.log.every
    # No schedule may end, and no phase begin, within the turns.
    small.duration.steps = 1_000_000
    if depth:
        return with_depth(small, depth)
    for narrow, wide in zip(sections(small), sections(config), strict=True):
        for tower in (name for name in TOWERS if isinstance(wide.get(name), ConfigDict)):
            narrow[tower].depth = _depth_of(wide[tower]) or narrow[tower].depth
    return small


def _depth_of(tower: ConfigDict) -> int | None:
    """Returns the layers of a tower; None where the section leaves them to the model."""
    size, own = tower.get("variant", "").partition("/")[0], tower.get("depth")
    return size_of(size, depth=own).depth if size else own


def make_narrow_setup(file: str, depth: int | None) -> Setup:
    """Makes the setup of the narrow config on the CPU devices of this process."""
    config = narrow_config(file, depth)
    return abstract_setup(config, mesh_lib.make_mesh(config.mesh))


def compile_seconds(setup: Setup) -> tuple[float, float]:
    """Returns (seconds to trace and compile the step, the part in XLA or in reading its cache)."""
    with CompileWatch() as watch:
        arguments = (setup.step, setup.abstract, setup.batch_spec, setup.mesh)
        whole = harness.seconds(lambda: compile_step(*arguments))
    return whole, watch.so_far().seconds


def measure_depths(file: str, rounds: int) -> dict[str, Any]:
    """Returns medians of cold compilations, the depths in turns."""
    jax.config.update("jax_enable_compilation_cache", False)

    def cold(setup: Setup) -> float:
        jax.clear_caches()
        return compile_seconds(setup)[0]

    turns = {d: functools.partial(cold, make_narrow_setup(file, d)) for d in DEPTHS}
    times = harness.in_turns(turns, rounds)
    found = {f"seconds_{depth}_layers": statistics.median(times[depth]) for depth in DEPTHS}
    for depth in DEPTHS:
        found[f"ratio_{depth}_layers"] = harness.ratio(times[depth], times[DEPTHS[0]]).median
    return found


def measure_warm_start(file: str, rounds: int) -> dict[str, Any]:
    """Times compilation in fresh processes, first with an empty cache and then with a full one."""
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                found[state].append(_in_new_process(file, cache))
    whole, in_xla = ({k: [t[i] for t in v] for k, v in found.items()} for i in (0, 1))
    return {
        **{f"seconds_{state}": statistics.median(each) for state, each in whole.items()},
        "ratio": harness.ratio(whole["warm"], whole["cold"]).median,
        "ratio_without_tracing": harness.ratio(in_xla["warm"], in_xla["cold"]).median,
    }


def _in_new_process(file: str, cache: str) -> tuple[float, float]:
    config = str(Path(file).resolve()) if Path(file).is_file() else file
    command = [sys.executable, "-m", "tools.perf.overhead", "--config", config]
    command += ["--compile-once", str(DEPTHS[-1])]
    # Only a new process starts as a restarted job does: with nothing in memory.
    variables = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=harness.ROOT)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


class HostRun:
    """The real loop on one batch that lies on the devices, a turn at a time."""

    def __init__(self, setup: Setup, folder: epath.Path):
        self._spent: dict[str, float] = {}
        startup = StartupClock()
        clock, writers = make_step_clock(setup, startup), setup.config.writers
        writer = build_writers(writers, folder, 0, {})
        program = setup.compile()
        self._runner = LoopRunner(setup, program, writer, clock, startup, timed=self._timed)
        self._state = setup.fresh_state()
        fields = {name: np.zeros(s.shape, s.dtype) for name, s in setup.batch_spec.items()}
        self._batch = put_batch(fields, setup.mesh)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `function` so that its CPU time on the calling thread counts as `name`."""

        def call(*arguments: Any) -> Any:
            begin = time.thread_time()
            try:
                return function(*arguments)
            finally:
                spent = time.thread_time() - begin
                self._spent[name] = self._spent.get(name, 0.0) + spent

        return call

    def __call__(self, steps: int) -> dict[str, float]:
        """Trains `steps` more steps; returns microseconds of a step by part."""
        self._spent.clear()
        loop = self._runner.loop(iter(lambda: self._batch, None), steps)
        # CPU time of this thread alone: waiting for a device is no work.
        begin, whole = time.thread_time(), time.process_time()
        self._state = loop.run(self._state)
        own = time.thread_time() - begin
        self._state = self._runner.settle(self._state)
        others = time.process_time() - whole - (time.thread_time() - begin)
        seconds = {
            "host": own,
            **self._spent,
            "rest": own - sum(self._spent.values()),
            "other_threads": others,
        }
        return {f"{k}_microseconds": v / steps * 1e6 for k, v in seconds.items()}


def measure_host(
    file: str, rounds: int, steps: int, together: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Returns CPU time of the main thread for a step of the real loop: medians over the rounds.

    Args:
      together: numbers of steps in a program; they take turns.
    """
    setup = make_narrow_setup(file, None)
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: HostRun(_with_dispatch(setup, n), epath.Path(folder)) for n in together}
        for number, run in runs.items():
            # The first calls compile and fill caches.
            run(WARM_UP * number)
        turns = {str(n): functools.partial(run, steps) for n, run in runs.items()}
        rows = harness.in_turns(turns, rounds)
    leaves = len(jax.tree.leaves(setup.abstract))
    return {
        f"host_{number}_a_dispatch": {
            name: statistics.median(row[name] for row in found) for name in found[0]
        }
        | {"arrays_of_the_state": leaves}
        for number, found in rows.items()
    }


def _with_dispatch(setup: Setup, number: int) -> Setup:
    config = setup.config.copy_and_resolve_references().unlock()
    config.steps_per_dispatch = number
    return dataclasses.replace(setup, config=config)


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments = parse(argv)
    jax.config.update("jax_platforms", "cpu")
    # Else a step would be computed within its dispatch, and count as work of the host.
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    file, rounds = arguments.config, arguments.rounds
    if arguments.compile_once:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        print(json.dumps(compile_seconds(make_narrow_setup(file, arguments.compile_once))))
        return
    found: dict[str, dict[str, Any]] = {}
    # The cold compilations come last: they turn the cache of this process off.
    if "host" in arguments.part:
        found |= measure_host(file, rounds, arguments.steps, arguments.steps_per_dispatch)
    if "warm" in arguments.part:
        found["warm"] = measure_warm_start(file, rounds)
    if "compile" in arguments.part:
        found["compile"] = measure_depths(file, rounds)
    for title, figures in found.items():
        print(f"{title.replace('_', ' ')}:")
        for name, value in figures.items():
            print(f"  {name.replace('_', ' '):<28} {value:.4g}")
    harness.write_json(arguments.json, "overhead", argv, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
