"""The monitor of a run: metrics, scores, clocks, traces and the watchdog, as the loop sees them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

from etils import epath
from ml_collections import ConfigDict

from vlp_jax.errors import UserError
from vlp_jax.objectives.base import Metrics
from vlp_jax.observe.profiler import NullProfiler, Profiler
from vlp_jax.observe.samples import Sample, write_samples
from vlp_jax.observe.throughput import StartupClock, StepClock, peak_flops
from vlp_jax.observe.watchdog import NullWatchdog, Watchdog
from vlp_jax.training.report import StepReport
from vlp_jax.training.setup import Setup
from vlp_jax.training.several_steps import SeveralMetrics
from vlp_jax.training.state import TrainState


class Monitor:
    """Takes note of the steps, scores and saves of the loop; it never changes the state.

    Args:
      report: reads, checks and writes the metrics of steps. Its writer, progress line, clock and
        measures are the monitor's.
      profiler: traces steps.
      watchdog: ends the process when a step takes too long.
    """

    def __init__(
        self,
        report: StepReport,
        profiler: Profiler | NullProfiler | None = None,
        watchdog: Watchdog | NullWatchdog | None = None,
    ) -> None:
        self._report = report
        self._profiler = profiler or NullProfiler()
        self._watchdog = watchdog or NullWatchdog()

    def begin_step(self, step: int, state: TrainState, count: int) -> None:
        """Collects garbage and begins or ends a trace, if due just before `count` steps."""
        self._report.measures.collect_garbage(step)
        # The state, because a trace must not begin before the step ahead of it is computed.
        self._profiler.step(step, state, count)

    def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
        """Wraps the time until the next batches are there."""
        return self._report.clock.data_wait()

    def end_step(self, step: int, metrics: Metrics | SeveralMetrics) -> None:
        """Takes the metrics of the steps that were handed to the devices from `step` on.

        Raises:
          NotFinite: too many steps were skipped, one after the other.
        """
        self._report.take(step, metrics)
        self._watchdog.beat()

    def settle(self) -> None:
        """Waits for the newest step, so that it is known how all steps so far went.

        Raises:
          NotFinite: too many steps were skipped, one after the other.
        """
        self._report.settle()

    @property
    def skipping(self) -> bool:
        """True if the newest settled step was skipped."""
        return self._report.skipped_in_a_row > 0

    def scores(
        self, step: int, name: str, scores: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        """Writes and shows what the evaluator `name` found before batch `step`."""
        named = {f"eval/{name}/{key}": value for key, value in scores.items()}
        self._report.writer.write_scalars(step, named)
        write_samples(self._report.writer, step, name, samples)
        text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
        self.tell(f"step {step:,}  {name}: {text}")

    def no_scores(self, step: int, name: str, error: Exception) -> None:
        """Tells that an evaluator has no scores, now and in the summary of the run."""
        self.tell(f"step {step:,}  {name}: no scores: {error}")
        self._report.measures.note(f"no scores of {name}", f"at step {step:,}")

    def saved(self, step: int) -> None:
        """Takes note of a checkpoint of the state before batch `step`."""
        # Metrics go to disk with the state: a restart begins here and writes no earlier step.
        self._report.measures.saved(step)
        self._report.writer.flush()

    def saves_failed(self, count: int) -> None:
        """Keeps the number of failed saves for the summary of the run."""
        if count:
            self._report.measures.note("saves failed", count)

    def tell(self, line: str) -> None:
        """Prints a line above the progress of the run."""
        self._report.progress.print(line)

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Wraps work that is not training, which may take longer than a step."""
        report = self._report
        with self._watchdog.patient(cause), report.clock.paused(cause), report.progress.paused():
            yield


def make_watchdog(config: ConfigDict, workdir: epath.Path) -> Watchdog | NullWatchdog:
    """Returns what ends this process when it hangs, after the limits of `config.watchdog`.

    Raises:
      UserError: only some of the limits are 0.
    """
    limits = config.watchdog
    # The devices are handed several steps at once, and the host hears of them together.
    step_minutes = limits.step_minutes * config.steps_per_dispatch
    minutes = (limits.first_step_minutes, step_minutes, limits.pause_minutes)
    if not any(minutes):
        return NullWatchdog()
    if not all(minute > 0 for minute in minutes):
        raise UserError("config.watchdog: the limits in minutes are above 0, or all of them 0")
    return Watchdog(*(60 * minute for minute in minutes), directory=workdir / "stacks")


def make_step_clock(setup: Setup, startup: StartupClock) -> StepClock:
    """Returns the clock of examples per second, MFU and goodput, which goes on from `startup`.

    MFU is measured against the peak of the devices at hand.
    """
    # A measurement beside other work is too slow: the clock repeats it when the devices idle.
    measure = functools.partial(
        peak_flops, setup.mesh.local_devices[0], setup.objective.compute_dtype
    )
    with startup.phase("measure the devices"):
        peak = measure()
    return StepClock(
        forward_flops_per_example=setup.forward_flops / setup.config.batch_size,
        peak=peak,
        device_count=setup.mesh.size,
        measure=measure,
        before=startup.causes(),
    )
