"""Python's garbage collection at chosen steps, the same on every process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

Pause = Callable[[str], AbstractContextManager[None]]
CAUSE = "garbage collection"


class ScheduledCollection:
    """Collects garbage before the steps that are multiples of `every`, and at no other time.

    Python collects when enough objects were made, which is at another step on each process; each
    time all others wait for it. As a context manager it switches that off and leaves out of all
    later collections what is there already (modules, the graph of the input), which makes them
    short; on leaving, all is as it was.

    Args:
      every: steps; 0 leaves Python's own collection on and does nothing.
      pause: charges the time inside to a cause.
    """

    def __init__(self, every: int, pause: Pause):
        self._every = every
        self._pause = pause
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._every:
            if gc.isenabled():
                gc.disable()
                self._undo.callback(gc.enable)
            if not gc.get_freeze_count():  # else somebody else's objects would be unfrozen
                with self._pause(CAUSE):
                    gc.collect()
                gc.freeze()
                self._undo.callback(gc.unfreeze)
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def __call__(self, step: int) -> None:
        """Collects if it is due before batch `step`."""
        if self._every and step and step % self._every == 0:
            with self._pause(CAUSE):
                gc.collect()
