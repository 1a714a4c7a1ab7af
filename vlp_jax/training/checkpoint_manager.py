"""Orbax's manager of checkpoints, without its part in preemption."""

from __future__ import annotations

import orbax.checkpoint as ocp


class Manager(ocp.CheckpointManager):
    """A `CheckpointManager` that never asks whether the job was told to stop.

    Orbax asks JAX at every save, with the number of its step. JAX takes each question for how far
    the process has come, and has all stop at the number after that; so only one may ask, which is
    `preemption.PreemptionWatch`. It would tell the answer to its own logs alone.
    """

    def reached_preemption(self, step: int) -> bool:
        """No."""
        del step
        return False
