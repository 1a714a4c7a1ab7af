"""How fast a run is, and where its time goes: examples a second, MFU, start-up, goodput."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Self

from vlp_jax.observe.accelerators import PeakFlops, peak_flops
from vlp_jax.observe.progress import format_duration

__all__ = ["PeakFlops", "StartupClock", "StepClock", "TimeLedger", "peak_flops"]

_USEFUL, _START, _DATA_WAIT = "useful", "start", "data wait"
_OTHER = "other"


class TimeLedger:
    """Charges every second that passes to exactly one cause: the innermost that is open.

    Args:
        default: the cause while none is open.
        time_fn: the clock, in seconds.
        started: when the time begins to count; None is now.
    """

    def __init__(self, default: str, time_fn: Callable[[], float], started: float | None = None):
        self._time = time_fn
        self._marked = time_fn() if started is None else started
        self._open = [default]
        self._seconds: dict[str, float] = {}

    @property
    def current(self) -> str:
        return self._open[-1]

    @contextlib.contextmanager
    def cause(self, name: str) -> Iterator[None]:
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def charge(self, name: str, seconds: float) -> None:
        """Adds time that passed before the ledger was opened."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by cause up to now, in the order in which the causes first came."""
        self._settle()
        return dict(self._seconds)

    def _settle(self) -> None:
        now = self._time()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._marked
        self._marked = now


class StepClock:
    """Speed of the steps between two summaries, and a ledger of the whole run.

    A window is the time since the last summary, without what was spent in `paused`. A step that
    finishes inside `paused` (the first one, in `paused("compile")`) counts in no window.

    JAX returns before the device is done, so a summary is true only when the loop has just waited
    for the newest step, as it does when it fetches the metrics it logs.

    Args:
        forward_flops_per_example: FLOPs of a forward pass, analytic.
        peak_flops_per_device: FLOP/s of one device, from `peak_flops`.
        device_count: devices of the whole job.
        startup_seconds: what passed before this clock was made, for the goodput.
        time_fn: the clock, in seconds.
    """

    def __init__(
        self,
        *,
        forward_flops_per_example: float,
        peak_flops_per_device: float,
        device_count: int,
        startup_seconds: float = 0.0,
        time_fn: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_example = 3 * forward_flops_per_example  # backward costs twice the forward
        self._peak = peak_flops_per_device * device_count
        self._startup_seconds = startup_seconds
        self._ledger = TimeLedger(_USEFUL, time_fn)
        self._window_start = self._ledger.seconds()
        self._steps = 0
        self._examples = 0

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Wraps waiting for the next batch; inside `paused` it is part of the pause."""
        cause = self._ledger.current
        with self._ledger.cause(_DATA_WAIT if cause == _USEFUL else cause):
            yield

    @contextlib.contextmanager
    def paused(self, cause: str) -> Iterator[None]:
        """Wraps what is not training: "compile", "evaluation", "checkpoint", ..."""
        if cause in (_USEFUL, _DATA_WAIT):
            raise ValueError(f"{cause!r} is not a cause of a pause")
        with self._ledger.cause(cause):
            yield

    def step_done(self, n_examples: int) -> None:
        """Counts a step on a batch of `n_examples`, over all hosts."""
        if self._ledger.current == _USEFUL:
            self._steps += 1
            self._examples += n_examples

    def summary(self) -> dict[str, float]:
        """Speed over the window that ends now; a new one begins. Empty if no step finished in it.

        Returns:
            perf/examples_per_second and perf/steps_per_second over all devices;
            perf/mfu, 3 x forward FLOPs x examples/s over the peak of all devices, in [0, 1]
            (PaLM, arXiv:2204.02311, appendix B; recomputation does not count, and the backward
            pass of frozen parameters, which is not computed, does);
            perf/data_wait_fraction, the share of the time spent waiting for batches, in [0, 1];
            perf/step_seconds, the mean time of a step with its wait.
        """
        seconds = self._ledger.seconds()
        spent = {
            cause: seconds.get(cause, 0.0) - self._window_start.get(cause, 0.0)
            for cause in (_USEFUL, _DATA_WAIT)
        }
        active = sum(spent.values())
        steps, examples = self._steps, self._examples
        if steps == 0 or active <= 0:
            return {}
        self._window_start, self._steps, self._examples = seconds, 0, 0
        return {
            "perf/examples_per_second": examples / active,
            "perf/steps_per_second": steps / active,
            "perf/mfu": self._flops_per_example * examples / active / self._peak,
            "perf/data_wait_fraction": spent[_DATA_WAIT] / active,
            "perf/step_seconds": active / steps,
        }

    def goodput(self) -> dict[str, float]:
        """Seconds by cause since the process started: "useful" (training steps), "start", ..."""
        useful_first = {_USEFUL: 0.0, _START: self._startup_seconds}
        for cause, seconds in self._ledger.seconds().items():
            useful_first[cause] = useful_first.get(cause, 0.0) + seconds
        return useful_first

    def goodput_line(self) -> str:
        """For the end of a run: `12m04s, of which useful 83.1%, start 3.2%, evaluation 6.0%`."""
        seconds = self.goodput()
        total = sum(seconds.values())
        shares = [f"{cause} {value / total:.1%}" for cause, value in seconds.items() if value > 0]
        return f"{format_duration(total)}, of which {', '.join(shares)}"


class StartupClock:
    """Explains the time to the first step, phase by phase.

    Args:
        time_fn: the clock, in seconds.
        started: when the time begins to count; None is now.
    """

    def __init__(
        self,
        time_fn: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ):
        self._ledger = TimeLedger(_OTHER, time_fn, started)

    @classmethod
    def from_process_start(cls, before: str = _OTHER) -> Self:
        """Counts from the start of the process where the system tells it (Linux), else from now.

        What ran before this call, `import jax` above all, is the phase `before`.
        """
        age = _process_age()
        clock = cls(started=time.perf_counter())
        clock._ledger.charge(before, age)
        return clock

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Wraps a phase. A nested one is taken out of its outer; a repeated one adds up."""
        with self._ledger.cause(name):
            yield

    def total(self) -> float:
        """Seconds since the start."""
        return sum(self._ledger.seconds().values())

    def report(self) -> str:
        """A heading with the total, then each phase with its seconds and share, then the rest."""
        seconds = self._ledger.seconds()
        total = sum(seconds.values())
        seconds[_OTHER] = seconds.pop(_OTHER, 0.0)  # last
        width = max(len(name) for name in seconds)
        lines = [f"first step after {total:.1f} s:"]
        for name, value in seconds.items():
            share = value / total if total else 0.0
            lines.append(f"  {name:<{width}}  {value:7.2f} s  {share:4.0%}")
        return "\n".join(lines)


def _process_age() -> float:
    """Seconds since this process started (man 5 proc, field 22 of stat), or 0 if unknown."""
    try:
        with open("/proc/self/stat") as file:
            after_name = file.read().rpartition(")")[2].split()
        start = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0  # not Linux
    return max(age, 0.0)
