"""Metrics of steps, read one step late so that the devices never wait for the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath

from vlp_jax.errors import NotFinite
from vlp_jax.objectives.base import Metrics
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.observe.writers import Writer
from vlp_jax.training.measures import LoopMeasures, NullMeasures
from vlp_jax.training.several_steps import SeveralMetrics
from vlp_jax.training.step import StepMetrics


def to_scalars(metrics: Metrics, prefix: str) -> dict[str, float]:
    """Divides sums by counts, as Python numbers named PREFIX + name; waits for the devices."""
    pairs = metrics.fetch() if isinstance(metrics, StepMetrics) else jax.device_get(metrics)
    return _ratios(pairs, prefix)


def _ratios(pairs: Mapping[str, tuple[float, float]], prefix: str) -> dict[str, float]:
    return {
        prefix + name: float(total) / float(count) if count else math.nan
        for name, (total, count) in pairs.items()
    }


def _of_each_step(metrics: Metrics | SeveralMetrics) -> list[dict[str, float]]:
    if isinstance(metrics, SeveralMetrics):
        return [_ratios(pairs, "train/") for pairs in metrics.fetch()]
    return [to_scalars(metrics, "train/")]


# A logged step writes its own value and no running mean, so that a resumed run writes the same
# numbers as a run that was never stopped.
class StepReport:
    """Checks, logs and shows the metrics of each step, after the next step was dispatched.

    Steps that were dispatched together are reported together.

    Args:
      log_when: selects the steps whose metrics are written.
      batch_size: examples of a step, over the whole mesh.
      writer, progress, clock: take the metrics, the progress and the time of steps.
      startup: its report is printed after the first step; None for no report.
      input_metrics: step -> metrics of the input just before its batch.
      max_skipped: steps that are skipped one after the other before the run ends.
      keep_examples: writes down which examples the batches of some steps hold; returns the file.
      measures: further metrics of a logged step; None for none.

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
        progress: Progress,
        clock: StepClock,
        startup: StartupClock,
        input_metrics: Callable[[int], Mapping[str, float]],
        max_skipped: int,
        keep_examples: Callable[[Sequence[int]], epath.Path],
        measures: LoopMeasures | None = None,
    ):
        self._log_when = log_when
        self._batch_size = batch_size
        self.writer = writer
        self.progress = progress
        self.clock = clock
        self._startup: StartupClock | None = startup
        self._input_metrics = input_metrics
        self.measures = measures or NullMeasures()
        self._max_skipped = max_skipped
        self._keep_examples = keep_examples
        self.skipped = self.skipped_in_a_row = 0
        self._pending: tuple[int, Metrics | SeveralMetrics] | None = None
        self._rate = math.nan

    def take(self, step: int, metrics: Metrics | SeveralMetrics) -> None:
        """Holds the metrics of batch `step`, or of several from it on, and settles older ones."""
        self.clock.dispatched(metrics)
        # The step before is read only now, while the devices compute this one.
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._settle(*pending)
        elif self._startup:  # the first step is waited for, so that its time can be told
            self.settle()
            self.progress.print(self._startup.report())
            self._startup = None

    def settle(self) -> None:
        """Waits for the newest step, and reports all steps so far.

        Raises:
          NotFinite: too many steps in a row were skipped.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            self._settle(*pending)

    def _settle(self, first: int, metrics: Metrics | SeveralMetrics) -> None:
        with self.clock.device_wait():
            each = _of_each_step(metrics)
        for _ in each:
            self.clock.step_done(self._batch_size)
        for step, scalars in enumerate(each, start=first):
            if scalars["train/skipped"]:
                self._note_skipped(step, scalars)
            else:
                self.skipped_in_a_row = 0
            if self._log_when(step):
                speed = self.clock.summary()
                self._rate = speed.get("perf/examples_per_second", self._rate)
                scalars.update({**speed, **self.measures.scalars(step, speed)})
                self.writer.write_scalars(step, {**scalars, **self._input_metrics(step + 1)})
        self.progress.update(first + len(each), each[-1]["train/loss"], self._rate)

    def _note_skipped(self, step: int, scalars: Mapping[str, float]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.measures.note("steps skipped", self.skipped)
        names = ("train/loss", "train/grad_norm")
        bad = [name for name in names if not math.isfinite(scalars[name])]
        what = " and ".join(f"{name} is {scalars[name]}" for name in bad)
        # All finite: then the guard has found a leap of the loss.
        what = what or f"train/loss leaps to {scalars['train/loss']:.4g}"
        self.progress.print(f"warning: step {step:,} is skipped: {what}")
        if self.skipped_in_a_row < self._max_skipped:
            return
        self.writer.write_scalars(step, scalars)
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
