"""Throughput of the training loop with its input, beside each of its two parts.

make bench, or: python -m tools.perf.loop [--config FILE] [--rounds N] [--steps N]

The parts are the same step on one fixed batch, and the same input without a step. All three run in
one process, in turns. The slower part bounds the loop; on CPU, where both use the same cores, so
does the sum of their times.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
from etils import epath
from ml_collections import ConfigDict

from tools.perf import harness
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.observe.writers import Writer, build_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.training.build import build, first_state, make_checkpointer
from vlp_jax.training.loop import Loop
from vlp_jax.training.monitor import Monitor, make_step_clock
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import StepProgram
from vlp_jax.training.when import StepsAhead

# Between turns, batches that wait in tf.data and on the devices are made again before a turn that
# should not pay for them, and are used up before one that should.
REFILL_SECONDS = 1.0
BUFFERED = 8  # batches that may lie ready, at most
PARTS = {"loop": "the loop with its input", "fixed": "one fixed batch", "input": "the input alone"}
SHARES = {
    "of_fixed_batch": "loop / fixed batch",
    "of_the_bound": "loop / slower part",
    "of_the_shared_bound": "loop / sum of both parts",
}


class NullCheckpointer:
    """Saves nothing."""

    failed = 0

    def poll(self) -> None:
        """Has nothing to look at."""


@dataclasses.dataclass
class LoopRunner:
    """Runs the real loop a few steps at a time, with all off that a step in the middle does not do.

    Attributes:
      step: the next step.
      timed: is given each function of the loop whose time is wanted, "dispatch" and "report".
    """

    setup: Setup
    program: StepProgram
    writer: Writer
    clock: StepClock
    startup: StartupClock
    progress: Progress | NullProgress = dataclasses.field(default_factory=NullProgress)
    input_metrics: Callable[[int], Mapping[str, float]] = lambda step: {}
    timed: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda name, function: function
    step: int = 0

    def __post_init__(self) -> None:
        self._monitor = Monitor(
            log_when=self.setup.log_when(),
            batch_size=self.setup.config.batch_size,
            writer=self.writer,
            progress=self.progress,
            clock=self.clock,
            startup=self.startup,
            input_metrics=self.input_metrics,
            max_skipped=self.setup.config.guard.max_skipped,
            keep_examples=lambda steps: epath.Path(),
        )
        # The loop calls it by this name, once a step.
        self._monitor.end_step = self.timed("report", self._monitor.end_step)
        self._program = self.timed("dispatch", self.program)

    def loop(self, batches: Iterator[Any], steps: int) -> Loop:
        """Returns the loop over the next `steps` steps."""
        first, self.step = self.step, self.step + steps
        log_when = self.setup.log_when()
        return Loop(
            program_of=lambda step: self._program,
            batches=batches,
            input_state=lambda step: {},
            first_step=first,
            last_step=self.step,
            save_when=lambda step: False,
            evaluations=(),
            one_evaluation=contextlib.nullcontext,
            preempted=lambda step: False,
            log_when=log_when,
            checkpointer=NullCheckpointer(),
            monitor=self._monitor,
            steps_ahead=StepsAhead(
                several=self.setup.config.steps_per_dispatch,
                first=0,
                last=self.step,
                begins=(log_when,),
            ),
        )

    def settle(self, state: TrainState) -> TrainState:
        """Waits for all that was started; returns `state`."""
        self._monitor.settle()
        return jax.block_until_ready(state)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config."""
    parser = harness.make_parser("loop", __doc__, config=False, rounds=5)
    told = "steps of a turn (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=40, metavar="N", help=told)
    parser.set_defaults(config="demo")
    return parse_with_overrides(parser, argv, "rounds", "steps")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the turns of each, and the examples of a turn."""

    loop: list[float]
    fixed: list[float]
    input: list[float]
    examples: int
    on_cpu: bool


def figures(times: Times) -> dict[str, Any]:
    """Returns rates, the ratios of the rounds, and which part bounds the loop.

    `of_the_bound` is against the slower part; `of_the_shared_bound`, on CPU, against the sum of the
    times of both parts, as if the cores did the one and then the other.
    """
    parts = list(zip(times.fixed, times.input, strict=True))
    bounds = {"of_fixed_batch": times.fixed, "of_the_bound": [max(pair) for pair in parts]}
    if times.on_cpu:
        # On an accelerator the input runs beside the step, and the sum bounds nothing.
        bounds["of_the_shared_bound"] = [sum(pair) for pair in parts]
    fixed, read = statistics.median(times.fixed), statistics.median(times.input)
    return {
        "loop_examples_per_second": times.examples / statistics.median(times.loop),
        "fixed_batch_examples_per_second": times.examples / fixed,
        "input_examples_per_second": times.examples / read,
        "bound_by": "the input" if read > fixed else "the step",
        "input_share": read / (read + fixed),
        "ratios": {
            name: harness.ratio(bound, times.loop).as_json() for name, bound in bounds.items()
        },
    }


class Turns:
    """The three turns, each of so many steps, around one state and one stream of batches."""

    def __init__(self, runner: LoopRunner, state: TrainState, batches: Prefetcher, steps: int):
        self._runner, self._state, self._batches, self._steps = runner, state, batches, steps
        # Before the first turn: later ones start with full buffers.
        self._fixed = next(batches)
        self._train(2)  # warm-up; prints the time to the first step

    def _train(self, steps: int) -> None:
        loop = self._runner.loop(self._batches, steps)
        self._state = self._runner.settle(loop.run(self._state))

    def loop(self) -> float:
        """Times the loop with its input."""
        # Batches that lie ready after a pause cost nothing: steps that use them are not timed.
        self._train(BUFFERED)
        return harness.seconds(lambda: self._train(self._steps))

    def fixed(self) -> float:
        """Times the step on the same batch again and again."""
        time.sleep(REFILL_SECONDS)
        begin = time.perf_counter()
        for _ in range(self._steps):
            self._state, _ = self._runner.program(self._state, self._fixed)
        jax.block_until_ready(self._state)
        return time.perf_counter() - begin

    def input(self) -> float:
        """Times batches that are read, put on the devices and dropped."""
        for _ in range(BUFFERED):
            next(self._batches)
        begin = time.perf_counter()
        for _ in range(self._steps):
            batch = next(self._batches)
        # The last one alone: batches reach the devices in order.
        jax.block_until_ready(batch)
        return time.perf_counter() - begin


def measure(config: ConfigDict, rounds: int, steps: int) -> Times:
    """Times `rounds` turns of each, of `steps` steps."""
    clock = StartupClock.from_process_start("python and imports")
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        parts = build(config, workdir, clock)
        setup = parts.setup
        with clock.phase("compile the step"):
            program = setup.compile()
        with clock.phase("initialize the state"):
            state = first_state(parts, make_checkpointer(setup.config, workdir), 0)
        print(mesh_lib.describe(setup.mesh))
        progress = Progress(setup.units.total_steps)
        runner = LoopRunner(
            setup,
            program,
            build_writers(config.writers, workdir, 0, {}),
            make_step_clock(setup, clock),
            clock,
            progress,
            parts.input_state.metrics,
        )
        prefetcher = Prefetcher(parts.pipeline.batches(0), setup.mesh, setup.config.prefetch)
        with progress, prefetcher as batches:
            turns = Turns(runner, state, batches, steps)
            found = harness.in_turns(
                {"fixed": turns.fixed, "loop": turns.loop, "input": turns.input},
                rounds,
                rotate=False,  # a turn leaves the buffers as the next one wants them
                before=lambda number, name: print(f"round {number + 1}: {PARTS[name]}", flush=True),
            )
        on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
        return Times(**found, examples=steps * setup.config.batch_size, on_cpu=on_cpu)


def report(found: dict[str, Any], rounds: int) -> list[str]:
    """Returns the figures, a line each."""
    rates = zip(PARTS.values(), ("loop", "fixed_batch", "input"), strict=True)
    lines = [
        f"{text:<28}{found[f'{key}_examples_per_second']:10,.0f} examples/s" for text, key in rates
    ]
    for name, ratio in found["ratios"].items():
        lines.append(
            f"{SHARES[name]:<28}{ratio['median']:10.3f}  (median of {rounds} rounds, "
            f"{ratio['min']:.3f} to {ratio['max']:.3f})"
        )
    lines.append(
        f"{found['bound_by']} bounds the loop: the input is {found['input_share']:.1%} of the time "
        "that both parts take one after the other"
    )
    return lines


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments, overrides = parse(argv)
    harness.start_run()
    config = load_config(arguments.config, overrides)
    found = figures(measure(config, arguments.rounds, arguments.steps))
    print("\n".join(report(found, arguments.rounds)))
    harness.write_json(arguments.json, "loop", argv, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
