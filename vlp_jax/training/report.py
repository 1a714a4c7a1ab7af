"""Reads and logs the metrics of each step, one step late: the devices never wait for the host."""

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
from vlp_jax.training.measures import LoopMeasures
from vlp_jax.training.several_steps import SeveralMetrics
from vlp_jax.training.step import StepMetrics


def to_scalars(metrics: Metrics, prefix: str) -> dict[str, float]:
    """Returns sum / count of each metric as a Python number, its name after `prefix`.

    Waits for the devices. A count of 0 gives NaN.
    """
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


class StepReport:
    """Checks, logs and shows the metrics of each step, after the next step was dispatched.

    Steps that were dispatched together are reported together.

    Args:
      log_when: selects the steps whose metrics are written.
      batch_size: examples of a step, over the whole mesh.
      input_metrics: step -> metrics of the input just before that batch.
      measures: further metrics of a logged step.
      max_skipped: the run ends when this many steps in a row were skipped.
      keep_examples: writes down the examples in the batches of some steps; returns the file.

    Attributes:
      skipped: the number of skipped steps.
      skipped_in_a_row: the number of skipped steps just before the newest one that was settled.
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
        measures: LoopMeasures,
        max_skipped: int,
        keep_examples: Callable[[Sequence[int]], epath.Path],
    ):
        self._log_when = log_when
        self._batch_size = batch_size
        self._writer = writer
        self._progress = progress
        self._clock = clock
        self._startup: StartupClock | None = startup
        self._input_metrics = input_metrics
        self._measures = measures
        self._max_skipped = max_skipped
        self._keep_examples = keep_examples
        self.skipped = self.skipped_in_a_row = 0
        self._pending: tuple[int, Metrics | SeveralMetrics] | None = None
        self._rate = math.nan

    def take(self, step: int, metrics: Metrics | SeveralMetrics) -> None:
        """Keeps the metrics of a dispatch that begins with `step`, and settles the one before."""
        self._clock.dispatched(metrics)
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._settle(*pending)
        elif self._startup:  # the first step is waited for, so that its time can be told
            self.settle()
            self._progress.print(self._startup.report())
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
        with self._clock.device_wait():
            each = _of_each_step(metrics)
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
        what = what or f"train/loss leaps to {scalars['train/loss']:.4g}"
        self._progress.print(f"warning: step {step:,} is skipped: {what}")
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
