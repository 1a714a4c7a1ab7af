"""The start of a job: one process, or several that find each other."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from vlp_jax.errors import UserError


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a job. Without arguments it is a job of this process alone.

    Args:
      coordinator: host:port on which process 0 listens.
      processes: how many take part.
      process_id: which of them this is.

    Raises:
      UserError: some but not all of the three are given, or the coordinator was not reached.
    """
    widen_cpu_thread_pool()
    given = (coordinator, processes, process_id)
    if all(value is None for value in given):
        return
    if any(value is None for value in given):
        raise UserError("--coordinator, --processes and --process-id belong together: give all")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"could not join the job at {coordinator}: {error}") from error


def widen_cpu_thread_pool() -> None:
    """Lets several CPU devices of one process wait for each other without blocking all threads.

    XLA runs the CPU devices on one pool with a thread per core. A device may wait in two
    collectives at once, so with few cores all threads can end up waiting, until XLA gives up and
    aborts after 40 s. The size of the pool is read from PJRT_NPROC when the first device is used.
    """
    devices = jax.config.jax_num_cpu_devices
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(8 * devices, os.cpu_count() or 1)))


def use_compilation_cache() -> str:
    """Keeps compiled programs on disk, so that the next start of the same run is quick.

    The folder is `JAX_COMPILATION_CACHE_DIR`, by default `~/.cache/vlp_jax/xla`. Returns it.
    """
    if not jax.config.jax_compilation_cache_dir:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlp_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return jax.config.jax_compilation_cache_dir
