"""Orbax's manager of checkpoints, without its part in preemption."""

from __future__ import annotations

import logging

import jax
import orbax.checkpoint as ocp

# Of an array that lies on several devices as a whole, what each of them copies at least.
SMALLEST_SLICE = 4 << 20


def state_handler(several: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Reads and writes the state.

    Where an array lies on several devices as a whole, Orbax has each of them copy and write a part.
    JAX compiles a program for every shape then, within the first save, which is worth it for large
    arrays alone, and never where the devices are one CPU.
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
    """A `CheckpointManager` that never asks whether the job was told to stop.

    Orbax asks JAX at every save, whose service for it is off: the signal belongs to
    `vlp_jax.signals`, and the processes agree in `preemption.PreemptionWatch`.
    """

    def reached_preemption(self, step: int) -> bool:
        """No."""
        del step
        return False


def processes(opening: int) -> ocp.options.MultiprocessingOptions:
    """Has Orbax wait for other processes through JAX's coordination service.

    Without it, it uses collectives on the devices, which get mixed up with a step under way. Orbax
    counts its barriers by name: where a save has failed on some processes alone, they have come to
    fewer than the others, so each `opening` has names of its own.
    """
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0,
        active_processes=set(range(jax.process_count())),
        barrier_sync_key_prefix=f"vlp_jax_{opening}",
    )


def quiet_failures() -> None:
    """Leaves it to `Checkpointer` to tell of a save that failed.

    On a full disk asyncio and Orbax log a stack for every array, and one for every thread.
    """
    for name in ("asyncio", "absl"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Told) for each in logger.filters):
            logger.addFilter(_Told())


class _Told(logging.Filter):
    """Leaves out what asyncio and Orbax log of a save that failed."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            return "exception was never retrieved" not in record.getMessage()
        return "orbax" not in record.pathname or record.levelno < logging.ERROR
