"""Converts durations to steps, and describes when something runs as a value: `EverySteps(100)`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

from vlp_jax.defaults import DURATION_UNITS
from vlp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Units:
    """Converts to steps; `epoch_examples` and `total_steps` are None where they are not known."""

    batch_size: int
    epoch_examples: int | None
    total_steps: int | None = None

    def steps(self, duration: Mapping[str, float | None], where: str) -> int:
        """Converts `duration`, a section with one unit set such as {"epochs": 3}; rounds up.

        `where` is the key of the section, for errors.

        Raises:
          UserError: not exactly one unit is set, the value is negative, or the size that the unit
            refers to is unknown.
        """
        given = {u: duration[u] for u in DURATION_UNITS if duration.get(u) is not None}
        if len(given) != 1:
            listed = ", ".join(f"{k}={v}" for k, v in given.items()) or "none"
            raise UserError(
                f"{where} needs exactly one of {', '.join(DURATION_UNITS)}; it sets {listed}"
                + (f" (clear one with --{where}.{next(iter(given))}=None)" if given else "")
            )
        (unit, value), *_ = given.items()
        if value < 0:
            raise UserError(f"{where}.{unit} is negative: {value}")
        if unit == "steps":
            return int(value)
        if unit == "percent":
            if self.total_steps is None:
                raise UserError(f"{where}.percent has nothing to be a percentage of")
            return math.ceil(self.total_steps * value / 100)
        examples = value
        if unit == "epochs":
            if self.epoch_examples is None:
                raise UserError(
                    f"{where} is in epochs, and the training data has no known size: set it in "
                    "steps or examples, or give it where there is no data (--epoch-examples)"
                )
            examples = value * self.epoch_examples
        return math.ceil(examples / self.batch_size)


@dataclasses.dataclass(frozen=True)
class EverySteps:
    """True at every multiple of `period` but 0, and at step `last`. With period 0, only there."""

    period: int
    last: int

    def __call__(self, step: int) -> bool:
        return step == self.last or (step > 0 < self.period and step % self.period == 0)


class EveryMinutes:
    """True when `minutes` (0 for never) have passed since the last `reset`.

    All processes go by the clock of process 0, whose value `agree` returns on every process. That
    takes a message, so the clock is read only at the steps that `look` selects.
    """

    def __init__(
        self,
        minutes: float,
        look: Callable[[int], bool],
        agree: Callable[[bool], bool],
        time_fn: Callable[[], float] = time.monotonic,
    ):
        self._seconds = 60 * minutes
        self._look, self._agree, self._time = look, agree, time_fn
        self._since = time_fn()

    def __call__(self, step: int) -> bool:
        """Whether the period is over just before batch `step`."""
        if not self._seconds or not self._look(step):
            return False
        # Every process calls `_agree`, also where its own clock says no: it is a message to all.
        return self._agree(self._time() - self._since >= self._seconds)

    def reset(self) -> None:
        """Begins a new period."""
        self._since = self._time()


@dataclasses.dataclass(frozen=True)
class StepsOrMinutes:
    """True when `steps` or `minutes` is true. Either one restarts the period of `minutes`."""

    steps: EverySteps
    minutes: EveryMinutes

    def __call__(self, step: int) -> bool:
        """Whether either is due just before batch `step`."""
        # `or` skips the clock where the steps say yes, on all processes alike.
        due = self.steps(step) or self.minutes(step)
        if due:
            self.minutes.reset()
        return due


# The answer follows from the config alone, so that all processes of a job hand over equally many.
@dataclasses.dataclass(frozen=True)
class StepsAhead:
    """Decides how many steps are dispatched at once: `several`, or 1 near work for the host.

    Attributes:
      first: the first step of this process. It is dispatched alone, so that its time can be told.
      last: the end of the run; the last step is `last - 1`.
      begins: tests that are true for a step before which the host has work. Such a step may begin
        a dispatch but not lie within one.
    """

    several: int
    first: int
    last: int
    begins: Sequence[Callable[[int], bool]]

    def __call__(self, step: int) -> int:
        """Returns the number of steps to dispatch, beginning with `step`."""
        if step == self.first or step + self.several > self.last:
            return 1
        within = range(step + 1, step + self.several)
        return 1 if any(begins(s) for begins in self.begins for s in within) else self.several
