"""Orbax's `CheckpointManager`, configured for this project: no preemption, no collectives."""

from __future__ import annotations

import logging

import jax
import orbax.checkpoint as ocp

# Bytes: a replicated array is written in slices by several devices only if each is this large.
SMALLEST_SLICE = 4 << 20


def state_handler(several: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Makes the Orbax handler that reads and writes the state.

    Orbax has each device that holds a copy of a replicated array write a slice of it. JAX compiles
    a program for each shape of a slice, within the first save. That pays for large arrays alone,
    and never on a single CPU.
    """
    one_cpu = jax.process_count() == 1 and jax.default_backend() == "cpu"
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=not one_cpu, min_slice_bytes_for_replica_parallel=SMALLEST_SLICE
    )
    known = ocp.type_handlers
    handlers = {kind: known.get_type_handler(kind) for kind in known.supported_types()}
    registry = known.create_type_handler_registry(*{**handlers, jax.Array: arrays}.items())
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=several, type_handler_registry=registry
    )


class Manager(ocp.CheckpointManager):
    """A `CheckpointManager` that never asks JAX whether the job was preempted.

    JAX's preemption service is off in this project: `vlp_jax.signals` handles SIGTERM, and
    `preemption.PreemptionWatch` lets the processes agree.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        del step
        return False


def processes(opening: int) -> ocp.options.MultiprocessingOptions:
    """Makes Orbax synchronize processes through JAX's coordination service.

    By default Orbax uses collectives on the devices, which get mixed up with a step under way.

    Args:
      opening: the number of this manager, which becomes part of the barriers' names. Orbax numbers
        its barriers. After a save that failed on some processes alone, the numbers of the old
        manager differ between processes.
    """
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0,
        active_processes=set(range(jax.process_count())),
        barrier_sync_key_prefix=f"vlp_jax_{opening}",
    )


def quiet_failures() -> None:
    """Silences the logs of asyncio and Orbax about a failed save, which `Checkpointer` reports.

    On a full disk they log a stack for every array and for every thread.
    """
    for name in ("asyncio", "absl"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _FailedSaveFilter) for each in logger.filters):
            logger.addFilter(_FailedSaveFilter())


class _FailedSaveFilter(logging.Filter):
    """Drops the log records of asyncio and Orbax about a failed save."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            return "exception was never retrieved" not in record.getMessage()
        return "orbax" not in record.pathname or record.levelno < logging.ERROR
