"""The time at which the devices finished a step, noted by a thread of its own."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax


class DeviceWatch:
    """Notes the time at which the devices have computed the newest step.

    A step is dispatched and computed later. Meanwhile the host can prepare and wait at no cost.
    Which part of a wait had no cost follows from the time at which the devices were done. The
    waiting thread does not see that time, so a thread that sleeps until then notes it.

    Args:
        time_fn: the clock, in seconds.
    """

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
