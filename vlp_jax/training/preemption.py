"""Being told to stop: by the scheduler (SIGTERM) or from the keyboard (SIGINT)."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class PreemptionWatch:
    """True once the run was told to stop, at the same step on every process.

    A job of one process takes SIGTERM and SIGINT itself. With several, JAX's own handler of SIGTERM
    has them agree on a step, which it needs `jax.distributed` for; a SIGINT is passed on to it. A
    second SIGINT, or SIGTERM with one process, ends the process as usual.
    """

    def __init__(self) -> None:
        self._received = False
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, object] = {}
        self._looks = 0

    def __enter__(self) -> Self:
        taken = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        for number in taken:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = True
        self._restore()
        if self._several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __call__(self, step: int) -> bool:
        """Whether to save and stop before batch `step`."""
        del step
        if self._several:
            # JAX has the processes agree on the next number after all that they have come to, so
            # these follow each other, whatever the steps between two looks.
            self._looks += 1
            return multihost_utils.reached_preemption_sync_point(self._looks)
        return self._received
