"""Being told to stop: by the scheduler (SIGTERM) or from the keyboard (SIGINT)."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from vlp_jax.errors import UserError

# sysexits.h, EX_TEMPFAIL: nothing is wrong, start the same command again to go on.
EXIT_RESTART = 75


class Preempted(UserError):
    """The run was told to stop, saved its state and can be resumed by the same command."""


class PreemptionWatch:
    """True once the run was told to stop, at the same step on every process.

    With one process it takes SIGTERM and SIGINT itself; a second one ends the process as usual.
    With several, JAX's own handler agrees on a step (it takes SIGTERM alone).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._received = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __call__(self, step: int) -> bool:
        """Whether to save and stop before batch `step`."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
