"""Being told to stop: by the scheduler (SIGTERM), from the keyboard (SIGINT) or by the machine."""

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

LOOK_SECONDS = 0.5  # between two looks whether another process was told
MANY_PROCESSES = 500  # of which as many look at process 0 in LOOK_SECONDS; more take turns
# How long the others may take to say how far they are, while nothing is lost without them.
START_SECONDS, FAREWELL_SECONDS = 10.0, 3.0


class PreemptionWatch:
    """True once the run was told to stop, at the same step on every process.

    A context manager, entered when the run starts. Until `begin` nothing was trained that is not
    saved already, so that being told ends the process:

    - A job of one process leaves that to `signals.heard`, which raises KeyboardInterrupt.
    - With several, a thread of each looks whether one was told. They tell each other how often they
      have looked for a stop, or that they start. If one of them starts all end at once; else all
      stop at the look after the furthest.

    Args:
      end: ends the process with a status.
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
        """Says that the start is over: what is done from now on has to be saved."""
        if self._several:
            with self._lock:
                self._looks = 0
        else:
            self._told = self._stack.enter_context(signals.noted())
        return self

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Within it, being told to stop raises KeyboardInterrupt in a job of one process.

        For what need not be finished. Several processes cannot end it at the same moment.
        """
        return contextlib.nullcontext() if self._several else signals.interruptible()

    def __call__(self, step: int) -> bool:
        """Whether to save and stop before batch `step`. All processes ask equally often."""
        del step
        if not self._several:
            return self._told.is_set()
        with self._lock:
            self._looks += 1
            return self._stop_at is not None and self._looks >= self._stop_at

    def _agree(self) -> None:
        """Waits until a process is told, and finds with the others where to stop."""
        pause = LOOK_SECONDS * max(1.0, jax.process_count() / MANY_PROCESSES)
        try:
            while not (self._told.is_set() or self._notice.given()):
                if self._over.wait(pause):
                    return
            self._notice.give()
            with self._lock:
                starts = self._looks is None
                seconds = START_SECONDS if starts else agreement.TIMEOUT_SECONDS
                looks = self._notice.answers("looks", self._looks, self._patience(seconds))
                if looks is not None and None not in looks:
                    self._stop_at = max(looks) + 1
                if self._stop_at is not None or not (starts or looks):
                    return
            # So that nobody misses a process that is gone before it has heard why.
            self._notice.answers("leave", True, self._patience(FAREWELL_SECONDS))
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, and JAX ends the job
        if jax.process_index() == 0:
            time.sleep(LOOK_SECONDS)  # it holds the messages that the others yet read
        line = "told to stop while the run started: run the same command to go on"
        print(line, file=sys.stderr, flush=True)
        self._end(ExitStatus.PREEMPTED)

    def _patience(self, seconds: float) -> Callable[[], bool]:
        until = time.monotonic() + seconds
        return lambda: time.monotonic() < until and not self._over.is_set()
