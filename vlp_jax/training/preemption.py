"""Notices requests to stop: from the scheduler (SIGTERM), the keyboard (SIGINT) or the machine."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

import jax

from vlp_jax import signals
from vlp_jax.errors import ExitStatus
from vlp_jax.parallel import agreement
from vlp_jax.parallel.maintenance import MaintenanceWatch

LOOK_SECONDS = 0.5  # between two looks whether another process was told to stop
# The key-value store on process 0 answers at most this many processes in LOOK_SECONDS. Larger jobs
# look less often.
MANY_PROCESSES = 500
# How long to wait for the answers of other processes where nothing is lost without them.
START_SECONDS, FAREWELL_SECONDS = 10.0, 3.0


class PreemptionWatch:
    """Returns True once the run was told to stop, at the same step on every process.

    A context manager, entered when the run starts. Until `begin` is called, nothing was trained
    that is not saved already, so a request to stop ends the process at once:

    - In a job of one process, `signals.heard` does so: it raises KeyboardInterrupt.
    - In a job of several, a thread of each process looks whether any process was told to stop. Then
      all processes exchange how often they were called, or that they still start. If any process
      still starts, all end at once. Otherwise all stop at the call after the furthest process's.

    Args:
      end: ends the process with the given status.
    """

    def __init__(self, end: Callable[[int], None] = os._exit) -> None:
        self._several = jax.process_count() > 1
        self._end = end
        self._stack = contextlib.ExitStack()
        self._told: threading.Event | None = None
        self._lock = threading.Lock()  # held while the processes agree
        self._looks: int | None = None  # None while the run starts
        self._stop_at: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._agree, name="preemption", daemon=True)

    def __enter__(self) -> Self:
        self._stack.enter_context(MaintenanceWatch())
        if self._several:
            self._told = self._stack.enter_context(signals.noted())
            self._notice = agreement.Notice("stop")
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._several:
            self._thread.join()
        self._stack.close()

    def begin(self) -> Self:
        """Ends the start phase: from now on a request to stop must save the state first."""
        if self._several:
            with self._lock:
                self._looks = 0
        else:
            self._told = self._stack.enter_context(signals.noted())
        return self

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which a stop raises KeyboardInterrupt, in a job of one process."""
        return contextlib.nullcontext() if self._several else signals.interruptible()

    def __call__(self, step: int) -> bool:
        """Whether to save and stop before batch `step`. All processes call it equally often."""
        del step
        if not self._several:
            return self._told.is_set()
        with self._lock:
            self._looks += 1
            return self._stop_at is not None and self._looks >= self._stop_at

    def _agree(self) -> None:
        """Waits until any process is told to stop, then agrees with all of them where to stop."""
        pause = LOOK_SECONDS * max(1.0, jax.process_count() / MANY_PROCESSES)
        try:
            while not (self._told.is_set() or self._notice.given()):
                if self._over.wait(pause):
                    return
            self._notice.give()
            with self._lock:
                starts = self._looks is None
                seconds = START_SECONDS if starts else agreement.TIMEOUT_SECONDS
                # The lock keeps `__call__` from going on meanwhile, so the count stays true.
                looks = self._notice.answers("looks", self._looks, self._patience(seconds))
                if looks is not None and None not in looks:
                    self._stop_at = max(looks) + 1
                if self._stop_at is not None or not (starts or looks):
                    return
            # A process that left before the others knew why would look like a crashed one to them.
            self._notice.answers("leave", True, self._patience(FAREWELL_SECONDS))
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, and JAX ends the job
        if jax.process_index() == 0:
            time.sleep(LOOK_SECONDS)  # process 0 serves the messages that the others still read
        line = "told to stop while the run started: run the same command to go on"
        print(line, file=sys.stderr, flush=True)
        self._end(ExitStatus.PREEMPTED)

    def _patience(self, seconds: float) -> Callable[[], bool]:
        until = time.monotonic() + seconds
        return lambda: time.monotonic() < until and not self._over.is_set()
