"""Watchdog that ends a process without a sign of life, and says where it was stuck."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from etils import epath

from vlp_jax.errors import ExitStatus

_CHECKS = 20  # looks at the clock within the shortest limit
# How much longer than the limit the system's own timer waits: it ends the process where Python
# cannot, because a call that hangs holds the interpreter's lock.
_BACKSTOP = 1.5


class NullWatchdog:
    """Watches nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def beat(self) -> None: ...

    @contextlib.contextmanager
    def patient(self, activity: str) -> Iterator[None]:
        del activity
        yield


class Watchdog:
    """Ends the process with status 70 when a step, or another activity, takes too long.

    Before that, it writes the stacks of all threads to stderr and to a file. A process whose peer
    died or hangs would wait in a collective operation for ever; the launchers start the job again.
    The time in which the process itself was stopped (SIGSTOP, a frozen machine) counts.

    Args:
      first_seconds: limit until the first `beat`: start, compilation, the first step.
      step_seconds: limit between two `beat`s.
      patient_seconds: limit of each activity within `patient` (evaluation, checkpoints).
      directory: where the stacks go, as stacks-TIME-PID.txt.
    """

    def __init__(
        self,
        first_seconds: float,
        step_seconds: float,
        patient_seconds: float,
        directory: epath.PathLike,
        end: Callable[[int], None] = os._exit,
    ):
        self._step_seconds, self._patient_seconds = step_seconds, patient_seconds
        self._directory = epath.Path(directory)
        self._end = end
        self._activity = "the start, up to the end of the first step"
        self._limit = first_seconds
        self._pause = min(first_seconds, step_seconds, patient_seconds) / _CHECKS
        self._since = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Takes a sign of life: a step is done, and the next has `step_seconds`."""
        self._expect("a step", self._step_seconds)

    @contextlib.contextmanager
    def patient(self, activity: str) -> Iterator[None]:
        """Wraps an activity that may take longer than a step."""
        with self._lock:
            before = self._activity, self._limit
        self._expect(activity, self._patient_seconds)
        try:
            yield
        finally:
            self._expect(*before)

    def _expect(self, activity: str, limit: float) -> None:
        with self._lock:
            self._activity, self._limit, self._since = activity, limit, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            with self._lock:
                activity, limit = self._activity, self._limit
                left = limit - (time.monotonic() - self._since)
            if left <= 0:
                self._bite(activity, limit)
                return
            if self._end is os._exit:
                later = left + _BACKSTOP * limit
                # sys.stderr may be replaced by what is no file, as in a notebook.
                faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__)

    def _bite(self, activity: str, limit: float) -> None:
        stacks = _stacks()
        message = f"error: watchdog: {activity} took over {limit:.0f} s; the process is ended"
        # To the terminal first: the disk may be what hangs.
        print(f"{stacks}\n{message}", file=sys.stderr, flush=True)
        writer = threading.Thread(target=self._keep, args=(stacks,), daemon=True)
        writer.start()
        writer.join(timeout=10)
        self._end(ExitStatus.HANG)

    def _keep(self, stacks: str) -> None:
        file = self._directory / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            file.write_text(stacks)
            print(f"the stacks of all threads are also in {file}", file=sys.stderr, flush=True)
        except OSError as error:
            print(f"the stacks could not be kept in {file}: {error}", file=sys.stderr, flush=True)


def _stacks() -> str:
    """Returns the stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
