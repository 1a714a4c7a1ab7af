"""Throughput of the training loop with its input, beside that of the same step on one fixed batch.

make bench, or: python -m tools.bench_loop [--config FILE] [--rounds N] [--steps N]

Both run in one process, in turns, so that a change in the speed of the machine meets both.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
from etils import epath

from vlp_jax import config as config_lib
from vlp_jax.observe.profiler import NullProfiler
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.observe.watchdog import NullWatchdog
from vlp_jax.observe.writers import build_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import startup
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.train import make_step_clock
from vlp_jax.training.build import Parts, build, first_state, make_checkpointer
from vlp_jax.training.command import run_command
from vlp_jax.training.loop import Loop
from vlp_jax.training.measures import NullMeasures
from vlp_jax.training.report import StepReport
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import StepFunction, compile_step


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_loop", description=__doc__)
    parser.add_argument("--config", default="configs/demo.py", help="what to train")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=40, help="steps of a turn")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args(argv)


class LoopRunner:
    """Runs the real loop, a few steps at a time, with saving and evaluation off."""

    def __init__(
        self,
        parts: Parts,
        step_function: StepFunction,
        workdir: epath.Path,
        startup_clock: StartupClock,
    ):
        self.step = 0
        self._parts, self._step_function = parts, step_function
        config, total = parts.setup.config, parts.setup.units.total_steps
        self._clock = make_step_clock(parts.setup, startup_clock)
        self._writer = build_writers(config.writers, workdir, 0, {})
        self._checkpointer = make_checkpointer(config, workdir)
        self.progress = Progress(total)
        self._report = StepReport(
            log_when=parts.log_when,
            batch_size=config.batch_size,
            writer=self._writer,
            progress=self.progress,
            clock=self._clock,
            startup=startup_clock,
            input_metrics=parts.input_state.metrics,
            measures=NullMeasures(),
            max_skipped=config.guard.max_skipped,
            keep_examples=functools.partial(parts.input_state.write_examples, workdir),
        )

    def __call__(self, state: TrainState, batches: Prefetcher, steps: int) -> TrainState:
        """The state after `steps` more steps."""
        first, self.step = self.step, self.step + steps
        loop = Loop(
            step_function=self._step_function,
            batches=batches,
            input_state=self._parts.input_state.save,
            first_step=first,
            last_step=self.step,
            save_when=lambda step: False,
            evaluations=(),
            one_evaluation=self._parts.resources.one_evaluation,
            preempted=lambda step: False,
            log_when=self._parts.log_when,
            report=self._report,
            checkpointer=self._checkpointer,
            writer=self._writer,
            progress=self.progress,
            clock=self._clock,
            profiler=NullProfiler(),
            watchdog=NullWatchdog(),
            measures=NullMeasures(),
        )
        state = loop.run(state)
        self._report.settle()
        return jax.block_until_ready(state)


def seconds(function: Callable[[], None]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(config_file: str, rounds: int, steps: int) -> dict[str, float]:
    """Examples per second of both, and the median over the rounds of the loop's share."""
    clock = StartupClock.from_process_start("python and imports")
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        parts = build(config_lib.load(config_file), workdir, clock)
        setup = parts.setup
        with clock.phase("compile the step"):
            step_function = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
        with clock.phase("initialize the state"):
            checkpointer = make_checkpointer(setup.config, workdir)
            state = first_state(parts, checkpointer, 0)
        print(mesh_lib.describe(setup.mesh))
        runner = LoopRunner(parts, step_function, workdir, clock)
        prefetcher = Prefetcher(parts.pipeline.batches(0), setup.mesh, setup.config.prefetch)
        with runner.progress, prefetcher as batches:
            fixed = next(batches)
            state = runner(state, batches, 2)  # warm-up; prints the time to the first step
            times: dict[str, list[float]] = {"loop": [], "fixed": []}

            def run_loop() -> None:
                nonlocal state
                state = runner(state, batches, steps)

            def run_fixed() -> None:
                nonlocal state
                for _ in range(steps):
                    state, _ = step_function(state, fixed)
                jax.block_until_ready(state)

            for _ in range(rounds):
                times["fixed"].append(seconds(run_fixed))
                times["loop"].append(seconds(run_loop))
    examples = steps * setup.config.batch_size
    shares = [f / t for f, t in zip(times["fixed"], times["loop"], strict=True)]
    return {
        "loop_examples_per_second": examples / statistics.median(times["loop"]),
        "fixed_batch_examples_per_second": examples / statistics.median(times["fixed"]),
        "ratio": statistics.median(shares),
        "ratio_min": min(shares),
        "ratio_max": max(shares),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.initialize()
        startup.use_compilation_cache()
        result = measure(arguments.config, arguments.rounds, arguments.steps)
        print(f"the loop with its input   {result['loop_examples_per_second']:8.0f} examples/s")
        print(
            f"one fixed batch           {result['fixed_batch_examples_per_second']:8.0f} examples/s"
        )
        print(
            f"ratio                     {result['ratio']:8.3f}  "
            f"(median of {arguments.rounds} rounds, "
            f"{result['ratio_min']:.3f} to {result['ratio_max']:.3f})"
        )
        if arguments.json:
            epath.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
