"""Throughput of the training loop with its input, beside each of its two parts.

make bench, or: python -m tools.perf.loop [--config FILE] [--rounds N] [--steps N]

The parts are the same step on one fixed batch, and the same input without a step. All three run in
one process, in turns. The slower part bounds the loop; on CPU, where both use the same cores, so
does the sum of their times. The CPU time of the main thread for a step of the loop is told as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
from etils import epath
from ml_collections import ConfigDict

from tools.perf import harness
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.observe.writers import build_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.training.build import build, first_state, make_checkpointer
from vlp_jax.training.loop import Loop
from vlp_jax.training.monitor import Monitor, make_step_clock
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
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


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config."""
    parser = harness.make_parser("loop", __doc__, config=False, rounds=5)
    told = "steps of a turn (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=40, metavar="N", help=told)
    parser.set_defaults(config="demo")
    return parse_with_overrides(parser, argv, "rounds", "steps")


def figures(
    times: Mapping[str, Sequence[float]], steps: int, examples: int, on_cpu: bool
) -> dict[str, Any]:
    """Returns rates, the ratios of the rounds, and which part bounds the loop.

    `of_the_bound` is against the slower part; `of_the_shared_bound`, on CPU, against the sum of the
    times of both parts, as if the cores did the one and then the other.

    Args:
      times: of the turns, by the names in `PARTS`; "host" are CPU seconds of the main thread in the
        turns of the loop: waiting is not counted.
      steps: of a turn.
      examples: of a turn.
    """
    parts = list(zip(times["fixed"], times["input"], strict=True))
    bounds = {"of_fixed_batch": times["fixed"], "of_the_bound": [max(pair) for pair in parts]}
    if on_cpu:
        # On an accelerator the input runs beside the step, and the sum bounds nothing.
        bounds["of_the_shared_bound"] = [sum(pair) for pair in parts]
    loop, fixed, read, host = (
        statistics.median(times[name]) for name in ("loop", "fixed", "input", "host")
    )
    return {
        "loop_examples_per_second": examples / loop,
        "fixed_batch_examples_per_second": examples / fixed,
        "input_examples_per_second": examples / read,
        "bound_by": "the input" if read > fixed else "the step",
        "input_share": read / (read + fixed),
        "host_microseconds_per_step": 1e6 * host / steps,
        "ratios": {
            name: harness.ratio(bound, times["loop"]).as_json() for name, bound in bounds.items()
        },
    }


class Turns:
    """The three turns, each of so many steps, around one state and one stream of batches.

    The loop is the real one, with all off that a step in the middle does not do.
    """

    def __init__(
        self, setup: Setup, state: TrainState, batches: Prefetcher, steps: int, monitor: Monitor
    ):
        self._setup, self._state, self._batches, self._steps = setup, state, batches, steps
        self._monitor, self._program, self._step = monitor, setup.compile(), 0
        self.host: list[float] = []
        # Before the first turn: later ones start with full buffers.
        self._fixed = next(batches)
        self._train(2)  # warm-up; prints the time to the first step

    def _train(self, steps: int) -> None:
        first, self._step = self._step, self._step + steps
        log_when = self._setup.log_when()
        loop = Loop(
            program_of=lambda step: self._program,
            batches=self._batches,
            input_state=lambda step: {},
            first_step=first,
            last_step=self._step,
            save_when=lambda step: False,
            evaluations=(),
            one_evaluation=contextlib.nullcontext,
            preempted=lambda step: False,
            log_when=log_when,
            checkpointer=NullCheckpointer(),
            monitor=self._monitor,
            steps_ahead=StepsAhead(
                several=self._setup.config.steps_per_dispatch,
                first=0,
                last=self._step,
                begins=(log_when,),
            ),
        )
        self._state = loop.run(self._state)
        self._monitor.settle()
        jax.block_until_ready(self._state)

    def loop(self) -> float:
        """Times the loop with its input."""
        # Batches that lie ready after a pause cost nothing: steps that use them are not timed.
        self._train(BUFFERED)
        # CPU time of this thread alone: steps are computed in others, and waiting is no work.
        begin = time.thread_time()
        seconds = harness.seconds(lambda: self._train(self._steps))
        self.host.append(time.thread_time() - begin)
        return seconds

    def fixed(self) -> float:
        """Times the step on the same batch again and again."""
        time.sleep(REFILL_SECONDS)
        begin = time.perf_counter()
        for _ in range(self._steps):
            self._state, _ = self._program(self._state, self._fixed)
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


def measure(config: ConfigDict, rounds: int, steps: int) -> dict[str, Any]:
    """Times `rounds` turns of each, of `steps` steps; returns the figures."""
    clock = StartupClock.from_process_start("python and imports")
    with tempfile.TemporaryDirectory() as folder:
        workdir = epath.Path(folder)
        parts = build(config, workdir, clock)
        setup = parts.setup
        with clock.phase("initialize the state"):
            state = first_state(parts, make_checkpointer(setup.config, workdir), 0)
        print(mesh_lib.describe(setup.mesh))
        progress = Progress(setup.units.total_steps)
        monitor = Monitor(
            log_when=setup.log_when(),
            batch_size=setup.config.batch_size,
            writer=build_writers(config.writers, workdir, 0, {}),
            progress=progress,
            clock=make_step_clock(setup, clock),
            startup=clock,
            input_metrics=parts.input_state.metrics,
            max_skipped=setup.config.guard.max_skipped,
            keep_examples=lambda steps: epath.Path(),
        )
        prefetcher = Prefetcher(parts.pipeline.batches(0), setup.mesh, setup.config.prefetch)
        with progress, prefetcher as batches:
            turns = Turns(setup, state, batches, steps, monitor)
            found = harness.in_turns(
                {"fixed": turns.fixed, "loop": turns.loop, "input": turns.input},
                rounds,
                rotate=False,  # a turn leaves the buffers as the next one wants them
                before=lambda number, name: print(f"round {number + 1}: {PARTS[name]}", flush=True),
            )
        on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
        times = {**found, "host": turns.host}
        return figures(times, steps, steps * setup.config.batch_size, on_cpu)


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
    host = found["host_microseconds_per_step"]
    lines.append(f"the main thread works {host:,.0f} us for a step of the loop")
    return lines


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments, overrides = parse(argv)
    harness.start_run()
    config = load_config(arguments.config, overrides)
    found = measure(config, arguments.rounds, arguments.steps)
    print("\n".join(report(found, arguments.rounds)))
    harness.write_json(arguments.json, "loop", argv, found)


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
