"""The monitor of a run: metrics, scores, clocks, traces and the watchdog, as the loop sees them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax.errors import NotFinite, UserError
from vlp_jax.objectives.base import Metrics
from vlp_jax.observe.accelerators import peak_flops
from vlp_jax.observe.profiler import Profiler
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.samples import Sample, write_samples
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.observe.watchdog import NullWatchdog, Watchdog
from vlp_jax.observe.writers import Writer
from vlp_jax.training.measures import Measures, NullMeasures
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import SeveralMetrics, StepMetrics


# A logged step writes its own value and no running mean, so that a resumed run writes the same
# numbers as a run that was never stopped.
class Monitor:
    """Takes note of the steps, scores and saves of the loop; it never changes the state.

    The metrics of a step are read after the next step was dispatched, so that the devices never
    wait for the host. Steps that were dispatched together are reported together.

    Args:
      log_when: selects the steps whose metrics are written.
      batch_size: examples of a step, over the whole mesh.
      startup: its report is printed after the first step; None for no report.
      input_metrics: step -> metrics of the input just before its batch.
      max_skipped: steps that are skipped one after the other before the run ends.
      keep_examples: writes down which examples the batches of some steps hold; returns the file.
      measures: further metrics of a logged step.
      profiler: traces steps.
      watchdog: ends the process when a step takes too long.

    Attributes:
      skipped: number of skipped steps.
      skipped_in_a_row: number of skipped steps up to the newest settled step.
    """

    def __init__(
        self,
        *,
        log_when: Callable[[int], bool],
        batch_size: int,
        writer: Writer,
        progress: Progress | NullProgress,
        clock: StepClock,
        startup: StartupClock | None,
        input_metrics: Callable[[int], Mapping[str, float]],
        max_skipped: int,
        keep_examples: Callable[[Sequence[int]], epath.Path],
        measures: Measures | NullMeasures | None = None,
        profiler: Profiler | None = None,
        watchdog: Watchdog | NullWatchdog | None = None,
    ):
        self._log_when, self._batch_size = log_when, batch_size
        self._writer, self._progress, self._clock = writer, progress, clock
        self._startup, self._input_metrics = startup, input_metrics
        self._max_skipped, self._keep_examples = max_skipped, keep_examples
        self._measures = measures or NullMeasures()
        self._profiler = profiler or Profiler(None, "")  # which traces nothing
        self._watchdog = watchdog or NullWatchdog()
        self.skipped = self.skipped_in_a_row = 0
        self._pending: tuple[int, Metrics | SeveralMetrics] | None = None
        self._rate = math.nan

    def begin_step(self, step: int, state: TrainState, count: int) -> None:
        """Collects garbage and begins or ends a trace, if due just before `count` steps."""
        self._measures.collect_garbage(step)
        # The state, because a trace must not begin before the step ahead of it is computed.
        self._profiler.step(step, state, count)

    def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
        """Wraps the time until the next batches are there."""
        return self._clock.data_wait()

    def end_step(self, step: int, metrics: Metrics | SeveralMetrics) -> None:
        """Takes the metrics of the steps that were handed to the devices from `step` on.

        Raises:
          NotFinite: too many steps were skipped, one after the other.
        """
        self._clock.dispatched(metrics)
        # The step before is read only now, while the devices compute this one.
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._settle(*pending)
        elif self._startup:  # the first step is waited for, so that its time can be told
            self.settle()
            self.tell(self._startup.report())
            self._startup = None
        self._watchdog.beat()

    def settle(self) -> None:
        """Waits for the newest step, so that it is known how all went; raises as `end_step`."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._settle(*pending)

    @property
    def skipping(self) -> bool:
        """True if the newest settled step was skipped."""
        return self.skipped_in_a_row > 0

    def _settle(self, first: int, metrics: Metrics | SeveralMetrics) -> None:
        with self._clock.device_wait():
            each = _scalars_of_each_step(metrics)
        for _ in each:
            self._clock.step_done(self._batch_size)
        for step, scalars in enumerate(each, start=first):
            if scalars["train/skipped"]:
                self._note_skipped(step, scalars)
            else:
                self.skipped_in_a_row = 0
            if self._log_when(step):
                speed = self._clock.summary()
                self._rate = speed.get("perf/examples_per_second", self._rate)
                scalars.update({**speed, **self._measures.scalars(step, speed)})
                self._writer.write_scalars(step, {**scalars, **self._input_metrics(step + 1)})
        self._progress.update(first + len(each), each[-1]["train/loss"], self._rate)

    def _note_skipped(self, step: int, scalars: Mapping[str, float]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._measures.note("steps skipped", self.skipped)
        names = ("train/loss", "train/grad_norm")
        bad = [name for name in names if not math.isfinite(scalars[name])]
        what = " and ".join(f"{name} is {scalars[name]}" for name in bad)
        # All finite: then the guard has found a leap of the loss.
        what = what or f"train/loss leaps to {scalars['train/loss']:.4g}"
        self.tell(f"warning: step {step:,} is skipped: {what}")
        if self.skipped_in_a_row < self._max_skipped:
            return
        self._writer.write_scalars(step, scalars)
        first = step - self.skipped_in_a_row + 1
        try:
            named = f"are named in {self._keep_examples(range(first, step + 1))}"
        except OSError as error:
            named = f"could not be written down ({error})"
        raise NotFinite(
            f"{what} at step {step}, the last of {self.skipped_in_a_row} that were skipped in a "
            f"row; their examples {named}. The last checkpoint was saved before them: "
            "start the run again; if it comes here once more, lower the learning rate, lengthen "
            "the warm-up, or look at these examples"
        )

    def scores(
        self, step: int, name: str, scores: Mapping[str, float], samples: Sequence[Sample]
    ) -> None:
        """Writes and shows what the evaluator `name` found before batch `step`."""
        named = {f"eval/{name}/{key}": value for key, value in scores.items()}
        self._writer.write_scalars(step, named)
        write_samples(self._writer, step, name, samples)
        text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
        self.tell(f"step {step:,}  {name}: {text}")

    def no_scores(self, step: int, name: str, error: Exception) -> None:
        """Tells that an evaluator has no scores, now and in the summary of the run."""
        self.tell(f"step {step:,}  {name}: no scores: {error}")
        self._measures.note(f"no scores of {name}", f"at step {step:,}")

    def saved(self, step: int) -> None:
        """Takes note of a checkpoint of the state before batch `step`."""
        # Metrics go to disk with the state: a restart begins here and writes no earlier step.
        self._measures.saved(step)
        self._writer.flush()

    def saves_failed(self, count: int) -> None:
        """Keeps the number of failed saves for the summary of the run."""
        if count:
            self._measures.note("saves failed", count)

    def tell(self, line: str) -> None:
        """Prints a line above the progress of the run."""
        self._progress.print(line)

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Wraps work that is not training, which may take longer than a step."""
        with self._watchdog.patient(cause), self._clock.paused(cause), self._progress.paused():
            yield


def _scalars_of_each_step(metrics: Metrics | SeveralMetrics) -> list[dict[str, float]]:
    """Divides sums by counts, as Python numbers; waits for the devices."""
    fetched = metrics.fetch() if isinstance(metrics, StepMetrics | SeveralMetrics) else None
    each = fetched or jax.device_get(metrics)
    return [
        {
            f"train/{name}": float(total) / float(count) if count else math.nan
            for name, (total, count) in pairs.items()
        }
        for pairs in (each if isinstance(each, list) else [each])
    ]


def make_watchdog(config: ConfigDict, workdir: epath.Path) -> Watchdog | NullWatchdog:
    """Makes the watchdog of `config.watchdog`; UserError if only some of its limits are 0."""
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
    """Makes the clock of speed, goodput, and MFU of the devices here; goes on from `startup`."""
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
