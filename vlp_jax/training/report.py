"""What a step reports, read one step late so that the devices never wait for the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax

from vlp_jax.errors import UserError
from vlp_jax.objectives.base import Metrics
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.observe.writers import Writer
from vlp_jax.training.measures import LoopMeasures


def to_scalars(metrics: Metrics, prefix: str) -> dict[str, float]:
    """Sums over counts, as Python numbers, each name behind `prefix`. Waits for the devices."""
    return {
        prefix + name: float(total) / float(count) if count else math.nan
        for name, (total, count) in jax.device_get(metrics).items()
    }


class StepReport:
    """Checks, logs and shows the metrics of each step after the next one was started.

    Args:
      log_when: steps whose metrics are written.
      batch_size: examples of a step, over the whole mesh.
      input_metrics: what to tell of the input just before a batch.
      measures: what else to tell of a logged step.
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
    ):
        self._log_when = log_when
        self._batch_size = batch_size
        self._writer = writer
        self._progress = progress
        self._clock = clock
        self._startup: StartupClock | None = startup
        self._input_metrics = input_metrics
        self._measures = measures
        self._pending: tuple[int, Metrics] | None = None
        self._rate = math.nan

    def take(self, step: int, metrics: Metrics) -> None:
        """Holds the metrics of batch `step`, and settles those of the one before."""
        self._clock.dispatched(metrics)
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._settle(*pending)
        elif self._startup:  # the first step is waited for, so that its time can be told
            self.settle()
            self._progress.print(self._startup.report())
            self._startup = None

    def settle(self) -> None:
        """Waits for the newest step, so that all that follows builds on numbers that are finite.

        Raises:
          UserError: the loss or the gradient of a step is not finite.
        """
        if self._pending:
            pending, self._pending = self._pending, None
            self._settle(*pending)

    def _settle(self, step: int, metrics: Metrics) -> None:
        with self._clock.device_wait():
            scalars = to_scalars(metrics, "train/")
        self._clock.step_done(self._batch_size)
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(scalars[name]):
                self._writer.write_scalars(step, scalars)
                raise UserError(
                    f"{name} is {scalars[name]} at step {step}; no later state was saved. Resume "
                    "from the last checkpoint with a lower learning rate or a longer warm-up, and "
                    "look at the data of this batch"
                )
        if self._log_when(step):
            if self._pending and jax.process_count() > 1:
                # The input's counts are gathered from all processes, which must not get mixed up
                # with what the devices exchange in the step that is under way.
                with self._clock.device_wait():
                    jax.block_until_ready(self._pending[1])
            speed = self._clock.summary()
            self._rate = speed.get("perf/examples_per_second", self._rate)
            scalars.update({**speed, **self._measures.scalars(step, speed)})
            self._writer.write_scalars(step, {**scalars, **self._input_metrics(step + 1)})
        self._progress.update(step + 1, scalars["train/loss"], self._rate)
