"""A function that a thread calls every few seconds beside the loop, or at once on request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self


class Heartbeat:
    """Calls `function` in a thread of its own: every `interval` seconds, and after `soon`.

    The caller never waits for it, so that a slow disk or object store costs the loop nothing. As a
    context manager it ends with one last call, for which it waits at most `patience` seconds.

    Args:
        function: must not raise.
    """

    def __init__(self, function: Callable[[], None], interval: float, patience: float = 30.0):
        self._function = function
        self._interval = interval
        self._patience = patience
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def soon(self) -> None:
        """Asks for a call now. Several requests before it begins are one."""
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join(self._patience)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._interval)
            self._wake.clear()
            last = self._ending  # read before the call: what is asked for during it is not lost
            self._function()
            if last:
                return
