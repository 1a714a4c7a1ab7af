"""Throughput of the training loop with its input, beside those of its two parts.

make bench, or: python -m tools.bench_loop [--config FILE] [--rounds N] [--steps N]

The parts are the same step on one fixed batch, and the same input without a step. All three run in
one process, in turns, so that a change in the speed of the machine meets all of them. The slower
part bounds the loop; on CPU, where both use the same cores, so does the sum of their times.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.arguments import check_arguments
from vlp_jax.benchmarking.provenance import provenance
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
from vlp_jax.training.several_steps import StepProgram
from vlp_jax.training.state import TrainState
from vlp_jax.training.when import StepsAhead

# Between turns: batches that wait, in tf.data and on the devices, are made again before a turn that
# should not pay for them, and are used up before one that should.
REFILL_SECONDS = 1.0
BUFFERED = 8  # batches that may lie ready, at most


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_loop", description=__doc__)
    parser.add_argument("--config", default="configs/demo.py", help="what to train")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=40, help="steps of a turn")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args(argv)
    check_arguments(arguments, "rounds", "steps")
    return arguments


class LoopRunner:
    """Runs the real loop, a few steps at a time, with saving and evaluation off."""

    def __init__(
        self,
        parts: Parts,
        step_function: StepProgram,
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
            program_of=lambda step: self._step_function,
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
            steps_ahead=StepsAhead(
                several=self._parts.setup.config.steps_per_dispatch,
                first=0,
                last=self.step,
                begins=(self._parts.log_when,),
            ),
        )
        state = loop.run(state)
        self._report.settle()
        return jax.block_until_ready(state)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the turns of each, and what a turn was."""

    loop: list[float]
    fixed: list[float]
    input: list[float]
    examples: int
    on_cpu: bool


def figures(times: Times) -> dict[str, Any]:
    """Rates, the ratios of the rounds, and which part bounds the loop.

    `of_the_bound` is against the slower part; `of_the_shared_bound`, on CPU, against the sum of the
    times of both parts, as if the cores did the one and then the other.
    """
    rounds = list(zip(times.loop, times.fixed, times.input, strict=True))
    shares = {
        "of_fixed_batch": [fixed / loop for loop, fixed, _ in rounds],
        "of_the_bound": [max(fixed, read) / loop for loop, fixed, read in rounds],
    }
    if times.on_cpu:
        shares["of_the_shared_bound"] = [(fixed + read) / loop for loop, fixed, read in rounds]
    fixed, read = statistics.median(times.fixed), statistics.median(times.input)
    return {
        "loop_examples_per_second": times.examples / statistics.median(times.loop),
        "fixed_batch_examples_per_second": times.examples / fixed,
        "input_examples_per_second": times.examples / read,
        "bound_by": "the input" if read > fixed else "the step",
        "input_share": read / (read + fixed),
        "ratios": {
            name: {"median": statistics.median(s), "min": min(s), "max": max(s), "rounds": s}
            for name, s in shares.items()
        },
    }


class Turns:
    """The three, each of so many steps, around one state and one stream of batches."""

    def __init__(
        self,
        runner: LoopRunner,
        step: StepProgram,
        batches: Prefetcher,
        steps: int,
    ):
        self._runner, self._step, self._batches, self._steps = runner, step, batches, steps
        self._fixed = next(batches)

    def loop(self, state: TrainState) -> tuple[TrainState, float]:
        """The loop with its input: the state after it, and its seconds."""
        # What waits after a pause was read for nothing: as many steps as can use it are not timed.
        state = self._runner(state, self._batches, BUFFERED)
        begin = time.perf_counter()
        state = self._runner(state, self._batches, self._steps)
        return state, time.perf_counter() - begin

    def fixed(self, state: TrainState) -> tuple[TrainState, float]:
        """The step on the same batch again and again."""
        time.sleep(REFILL_SECONDS)
        begin = time.perf_counter()
        for _ in range(self._steps):
            state, _ = self._step(state, self._fixed)
        jax.block_until_ready(state)
        return state, time.perf_counter() - begin

    def input(self) -> float:
        """Batches that are read, put on the devices and dropped."""
        for _ in range(BUFFERED):
            next(self._batches)
        begin = time.perf_counter()
        for _ in range(self._steps):
            batch = next(self._batches)
        jax.block_until_ready(batch)
        return time.perf_counter() - begin


def measure(config: ConfigDict, rounds: int, steps: int) -> Times:
    """The seconds of `rounds` turns of each, of `steps` steps."""
    clock = StartupClock.from_process_start("python and imports")
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        parts = build(config, workdir, clock)
        setup = parts.setup
        with clock.phase("compile the step"):
            step_function = setup.compile()
        with clock.phase("initialize the state"):
            checkpointer = make_checkpointer(setup.config, workdir)
            state = first_state(parts, checkpointer, 0)
        print(mesh_lib.describe(setup.mesh))
        runner = LoopRunner(parts, step_function, workdir, clock)
        prefetcher = Prefetcher(parts.pipeline.batches(0), setup.mesh, setup.config.prefetch)
        on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
        times = Times([], [], [], steps * setup.config.batch_size, on_cpu)
        with runner.progress, prefetcher as batches:
            turns = Turns(runner, step_function, batches, steps)
            state = runner(state, batches, 2)  # warm-up; prints the time to the first step
            for number in range(rounds):
                state, seconds = turns.fixed(state)
                times.fixed.append(seconds)
                state, seconds = turns.loop(state)
                times.loop.append(seconds)
                times.input.append(turns.input())
                told = ", ".join(
                    f"{name} {seconds[-1]:.2f} s"
                    for name, seconds in (
                        ("fixed batch", times.fixed),
                        ("loop", times.loop),
                        ("input alone", times.input),
                    )
                )
                print(f"round {number + 1} of {rounds}: {told}", flush=True)
    return times


def report(found: dict[str, Any], rounds: int) -> list[str]:
    """The figures, a line each."""
    rates = {
        "the loop with its input": "loop",
        "one fixed batch": "fixed_batch",
        "the input alone": "input",
    }
    lines = [
        f"{text:<28}{found[f'{key}_examples_per_second']:10,.0f} examples/s"
        for text, key in rates.items()
    ]
    texts = {
        "of_fixed_batch": "loop / fixed batch",
        "of_the_bound": "loop / slower part",
        "of_the_shared_bound": "loop / sum of both parts",
    }
    for name, ratio in found["ratios"].items():
        lines.append(
            f"{texts[name]:<28}{ratio['median']:10.3f}  (median of {rounds} rounds, "
            f"{ratio['min']:.3f} to {ratio['max']:.3f})"
        )
    lines.append(
        f"{found['bound_by']} bounds the loop: the input is {found['input_share']:.1%} of the time "
        "that both parts take one after the other"
    )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        arguments = parse(argv)
        startup.initialize()
        startup.use_compilation_cache()
        config = config_lib.load(arguments.config)
        found = figures(measure(config, arguments.rounds, arguments.steps))
        print("\n".join(report(found, arguments.rounds)))
        if arguments.json:
            content = {**provenance("tools.bench_loop", argv), **found}
            epath.Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
