"""Clocks of a run: examples a second, MFU, start-up, time by cause."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax

from vlp_jax.observe.accelerators import PeakFlops

_USEFUL, _START, _DATA_WAIT, _CHECKPOINT = "useful", "start", "data wait", "checkpoint"
_COMPILE, _OTHER = "compile", "other"


class TimeLedger:
    """Charges every second that passes to exactly one cause: the innermost that is open.

    One thread opens and closes causes; any thread may ask for the seconds. `default` is the cause
    while none is open; `started` is when the time begins to count (None: now).
    """

    def __init__(self, default: str, time_fn: Callable[[], float], started: float | None = None):
        self._time = time_fn
        self._marked = time_fn() if started is None else started
        self._open = [default]
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def current(self) -> str:
        return self._open[-1]

    @contextlib.contextmanager
    def cause(self, name: str) -> Iterator[None]:
        with self._lock:
            self._settle()
            self._open.append(name)
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._open.pop()

    def change_default(self, name: str) -> None:
        """Charges time in which no cause is open to `name` from now on."""
        with self._lock:
            self._settle()
            self._open[0] = name

    def charge(self, name: str, seconds: float) -> None:
        """Adds time that passed before the ledger was opened."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves up to `seconds` from the cause `source` to the cause `target`."""
        with self._lock:
            self._settle()
            moved = min(max(seconds, 0.0), self._seconds.get(source, 0.0))
            if moved:
                self._seconds[source] -= moved
                self._seconds[target] = self._seconds.get(target, 0.0) + moved

    def seconds(self) -> dict[str, float]:
        """Returns seconds by cause up to now, in the order in which the causes first came."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def _settle(self) -> None:
        now = self._time()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._marked
        self._marked = now


class DeviceWatch:
    """Notes when the devices have computed the newest step, in a thread that sleeps until then."""

    def __init__(self, time_fn: Callable[[], float]):
        self._time = time_fn
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._watched = 0
        self._done = (0, 0.0)  # how many steps are done, and the time of the last

    def watch(self, arrays: Any) -> None:
        """Begins to wait for `arrays` of the newest step, which must not be donated."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="device_watch", daemon=True)
            self._thread.start()
        self._watched += 1
        self._queue.put(arrays)

    def busy_between(self, begin: float, end: float) -> float:
        """Returns the seconds from `begin` to `end` in which the newest step was not done."""
        if not self._watched:
            return 0.0
        done, at = self._done
        if done < self._watched:
            return end - begin
        return min(max(at - begin, 0.0), end - begin)

    def close(self) -> None:
        """Ends the thread once the devices are done."""
        if self._thread is not None:
            self._queue.put(None)

    def _run(self) -> None:
        done = 0
        while (arrays := self._queue.get()) is not None:
            # A step that failed is done as well. The loop meets the same error when it fetches
            # these arrays, and reports it.
            with contextlib.suppress(RuntimeError):
                jax.block_until_ready(arrays)
            del arrays
            done += 1
            self._done = (done, self._time())


class StepClock:
    """Speed of the steps between two summaries, and a ledger of the whole run.

    A window is the time since the last summary, without the time in `paused`. A step that finishes
    inside `paused` counts in no window. JAX returns before the device is done: so a summary is true
    only when the loop has just waited for the newest step.

    Args:
        forward_flops_per_example: FLOPs of a forward pass, counted in the jaxpr.
        peak: FLOP/s of one device, from `peak_flops`.
        device_count: devices of the whole job.
        measure: measures the peak of a device again. A measurement beside other work on the machine
            is too slow, and steps beat it. Then the peak is measured again when the devices have
            nothing to do, and the faster figure counts.
        before: seconds by cause that passed before this clock was made, for the goodput.
    """

    def __init__(
        self,
        *,
        forward_flops_per_example: float,
        peak: PeakFlops,
        device_count: int,
        measure: Callable[[], PeakFlops] | None = None,
        before: Mapping[str, float] | None = None,
        time_fn: Callable[[], float] = time.perf_counter,
    ):
        self._time = time_fn
        self.count_flops(forward_flops_per_example)
        self.peak = peak
        self._device_count = device_count
        self._measure = measure if peak.source == "measured" else None
        self._beaten = False
        self._before = dict(before or {})
        self._ledger = TimeLedger(_USEFUL, time_fn)
        self._watch = DeviceWatch(time_fn)
        self._window_start = self._ledger.seconds()
        self._device_wait = 0.0
        self._steps = 0
        self._examples = 0
        self.steps_done = 0  # of this process, in windows or not
        self.examples_done = 0

    def dispatched(self, arrays: Any) -> None:
        """Takes note that the step that computes `arrays` was handed to the devices."""
        self._watch.watch(arrays)

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Wraps waiting for a batch; what the devices compute meanwhile is not charged to it."""
        cause = self._ledger.current
        if cause != _USEFUL:
            yield
            return
        begin = self._time()
        with self._ledger.cause(_DATA_WAIT), jax.profiler.TraceAnnotation(_DATA_WAIT):
            yield
        end = self._time()
        self._ledger.move(self._watch.busy_between(begin, end), _DATA_WAIT, _USEFUL)

    @contextlib.contextmanager
    def device_wait(self) -> Iterator[None]:
        """Wraps waiting for the devices. It is part of the step, whose cause stays "useful"."""
        begin = self._time()
        try:
            yield
        finally:
            if self._ledger.current == _USEFUL:
                self._device_wait += self._time() - begin

    @contextlib.contextmanager
    def paused(self, cause: str) -> Iterator[None]:
        """Wraps work that is not training: "compile", "evaluation", "checkpoint", ..."""
        if cause in (_USEFUL, _DATA_WAIT):
            raise ValueError(f"{cause!r} is not a cause of a pause")
        with self._ledger.cause(cause), jax.profiler.TraceAnnotation(cause):
            self._measure_again()
            yield

    def _measure_again(self) -> None:
        if self._beaten and self._measure is not None:
            self._beaten = False
            self.peak = max(self.peak, self._measure(), key=lambda peak: peak.flops)

    @property
    def pausing(self) -> bool:
        """True while work that is not training is under way."""
        return self._ledger.current not in (_USEFUL, _DATA_WAIT)

    def compiled(self, seconds: float) -> None:
        """Charges the last `seconds` to compiling, whatever cause is open."""
        self._ledger.move(seconds, self._ledger.current, _COMPILE)

    def step_done(self, n_examples: int) -> None:
        """Counts a step on a batch of `n_examples`, over all hosts."""
        self.steps_done += 1
        self.examples_done += n_examples
        if self._ledger.current == _USEFUL:
            self._steps += 1
            self._examples += n_examples

    def finish(self) -> None:
        """Takes note of the last step: later time is waiting for the last checkpoint."""
        self._ledger.change_default(_CHECKPOINT)
        self._watch.close()

    def summary(self) -> dict[str, float]:
        """Ends the window and returns its speed; empty if no step finished in it.

        Returns:
            perf/examples_per_second and perf/steps_per_second over all devices;
            perf/mfu, 3 x forward FLOPs x examples/s over the peak of all devices, in [0, 1]
            (PaLM, arXiv:2204.02311, appendix B; recomputation does not count, the backward pass of
            frozen parameters does). A value above 1, where the peak or the time must be wrong, is
            left
            out;
            perf/data_wait_fraction, the share of the time in which the devices had nothing to do
            because the next batch was not there;
            perf/device_wait_fraction, the share in which this process waited for the devices;
            perf/step_seconds, the mean time of a step with its wait.
        """
        seconds = self._ledger.seconds()
        spent = {
            cause: seconds.get(cause, 0.0) - self._window_start.get(cause, 0.0)
            for cause in (_USEFUL, _DATA_WAIT)
        }
        active = sum(spent.values())
        steps, examples, device_wait = self._steps, self._examples, self._device_wait
        if steps == 0 or active <= 0:
            return {}
        self._window_start, self._steps, self._examples = seconds, 0, 0
        self._device_wait = 0.0
        return {
            **self._speed(steps, examples, active),
            "perf/data_wait_fraction": spent[_DATA_WAIT] / active,
            "perf/device_wait_fraction": min(device_wait / active, 1.0),
            "perf/step_seconds": active / steps,
        }

    def overall(self) -> dict[str, float]:
        """Returns the first three figures of `summary` over all steps, when devices are idle."""
        seconds = self._ledger.seconds()
        active = seconds.get(_USEFUL, 0.0) + seconds.get(_DATA_WAIT, 0.0)
        if not self.steps_done or active <= 0:
            return {}
        self._measure_again()
        return self._speed(self.steps_done, self.examples_done, active)

    def count_flops(self, forward_flops_per_example: float) -> None:
        """Sets the FLOPs of an example from now on, from its forward pass."""
        # The backward pass takes two products for each product of the forward pass.
        self._flops_per_example = 3 * forward_flops_per_example

    def goodput(self) -> dict[str, float]:
        """Returns seconds by cause since the process started, "useful" (training steps) first."""
        useful_first = {_USEFUL: 0.0, **self._before}
        for cause, seconds in self._ledger.seconds().items():
            useful_first[cause] = useful_first.get(cause, 0.0) + seconds
        return useful_first

    def _speed(self, steps: int, examples: int, active: float) -> dict[str, float]:
        peak_of_all = self.peak.flops * self._device_count
        mfu = self._flops_per_example * examples / active / peak_of_all
        self._beaten |= mfu > 1
        return {
            "perf/examples_per_second": examples / active,
            "perf/steps_per_second": steps / active,
            **({"perf/mfu": mfu} if mfu <= 1 else {}),
        }


class StartupClock:
    """Explains the time to the first step, phase by phase, from `started` (None: now) on."""

    def __init__(
        self,
        time_fn: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ):
        self._ledger = TimeLedger(_OTHER, time_fn, started)

    @classmethod
    def from_process_start(cls, before: str = _OTHER) -> Self:
        """Counts from the start of the process (Linux, else now), first as `before`."""
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
        """Returns the seconds since the start."""
        return sum(self._ledger.seconds().values())

    def causes(self) -> dict[str, float]:
        """Returns the seconds since the start under the causes "start" and "compile"."""
        causes = {_START: 0.0, _COMPILE: 0.0}
        for name, seconds in self._ledger.seconds().items():
            causes[_COMPILE if name.startswith(_COMPILE) else _START] += seconds
        return causes

    def report(self) -> str:
        """Writes a heading with the total, then each phase with its seconds and share."""
        seconds = self._ledger.seconds()
        total = sum(seconds.values())
        seconds[_OTHER] = seconds.pop(_OTHER, 0.0)  # last
        width = max(map(len, seconds))
        rows = (
            f"  {name:<{width}}  {value:7.2f} s  {value / total if total else 0.0:4.0%}"
            for name, value in seconds.items()
        )
        return "\n".join([f"first step after {total:.1f} s:", *rows])


def _process_age() -> float:
    """Reads the seconds since this process started (man 5 proc, stat); 0 if unknown."""
    try:
        with open("/proc/self/stat") as file:
            # The name of the process, in brackets, may hold spaces and brackets itself.
            after_name = file.read().rpartition(")")[2].split()
        start = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - start
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0  # not Linux
    return max(age, 0.0)
