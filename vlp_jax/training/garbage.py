"""Runs Python's garbage collection at chosen steps, the same on every process."""

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

    Python's automatic collection begins once enough objects were made, so at different steps on
    different processes. Each time, all processes wait for the slow one. This context manager
    switches automatic collection off. It also freezes the objects that exist on entry (modules, the
    input graph), so that later collections skip them and are short. On exit it restores both.

    Args:
      every: steps between collections; 0 does nothing and leaves automatic collection on.
      pause: charges the time within to a cause.
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
            if not gc.get_freeze_count():  # else the exit would unfreeze another caller's objects
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
