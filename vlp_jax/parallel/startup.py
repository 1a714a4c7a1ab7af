"""Starts a job of one process, or joins the processes of a job through `jax.distributed`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# JAX has no public way to ask whether its devices are in use already.
from jax._src import xla_bridge

from vlp_jax.errors import ExitStatus, PeerLost, UserError
from vlp_jax.parallel import agreement

HEARTBEAT_SECONDS = 100.0
JOIN_SECONDS = 300.0  # how long a process waits for the coordinator
FAREWELL_SECONDS = 60  # how long a process waits for the others at its end

_TABLE_ROWS = 16  # the table of processes lists at most this many


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Describes how the processes of a job find each other.

    Attributes:
      kind: the source of the description (flags, SLURM, ...), for the log.
      arguments: arguments of `jax.distributed.initialize`.
    """

    kind: str
    arguments: Mapping[str, Any]


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    expected: int | None = None,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
    join_seconds: float = JOIN_SECONDS,
) -> str:
    """Joins the processes of a job through `jax.distributed`. A single process joins itself.

    Without the first three arguments, the environment variables of SLURM, Cloud TPU VMs, GKE and
    Open MPI decide. If none of these is present, the job is this process alone.

    Args:
      coordinator: host:port on which process 0 listens.
      processes: the number of processes.
      process_id: the index of this process.
      expected: the required number of processes; None for any number.
      heartbeat_seconds: a process that is silent for this long counts as lost, and all others end.
      join_seconds: how long to wait for the coordinator.

    Returns:
      The source of the cluster's description, for the log.

    Raises:
      UserError: some but not all of the first three arguments are given, the coordinator cannot be
        reached, or the number of processes is not `expected`. If processes do not arrive in time,
        this process exits instead.
    """
    widen_cpu_thread_pool()
    cluster = find_cluster(coordinator, processes, process_id)
    if cluster.kind == ALONE and _devices_are_in_use():
        _check_count(1, expected)
        return f"{cluster.kind} (devices were in use before, so that JAX's services are not there)"
    if not jax.distributed.is_initialized():
        # JAX's preemption service would take SIGTERM away from `vlp_jax.signals`.
        jax.config.update("jax_enable_preemption_service", False)
        if cluster.kind == ALONE:
            # Devices of one process need no network between them.
            jax.config.update("jax_cpu_collectives_implementation", None)
        _look_for_coordinator(cluster.arguments, join_seconds)
        try:
            with _time_to_meet(cluster, join_seconds):
                jax.distributed.initialize(
                    **cluster.arguments,
                    heartbeat_timeout_seconds=max(1, round(heartbeat_seconds)),
                    initialization_timeout=round(join_seconds) + 60,
                    shutdown_timeout_seconds=FAREWELL_SECONDS,
                )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"the processes of the job ({cluster.kind}) could not be joined: "
                f"{str(error).splitlines()[0]}; give --coordinator, --processes and --process-id"
            ) from error
    _check_count(jax.process_count(), expected)
    return cluster.kind


def _look_for_coordinator(arguments: Mapping[str, Any], seconds: float) -> None:
    """Waits until process 0 listens. JAX would wait as well, but abort the process on a timeout.

    Raises:
      PeerLost: process 0 does not listen in time.
      UserError: this is process 0, and its port is taken.
    """
    if "coordinator_address" not in arguments:
        return  # JAX knows how to find it
    host, _, port = arguments["coordinator_address"].rpartition(":")
    place = f"{host}:{port}"
    if arguments["process_id"] == 0:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen at {place}: {error.strerror}; choose another port"
            ) from error
        return
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(1.0, seconds / 4)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PeerLost(
                    f"no process 0 at {place} within {seconds:g} s: {error.strerror or error}; see "
                    "that it runs, that the address is the same for all processes and that the "
                    "port is open to this host"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def _time_to_meet(cluster: Cluster, seconds: float) -> Iterator[None]:
    """Exits with a one-line error if processes are missing; JAX would abort with a stack trace."""

    def give_up() -> None:
        where = cluster.arguments.get("coordinator_address", "the coordinator's address")
        print(
            f"error: the {cluster.arguments.get('num_processes', '')} processes of the job "
            f"({cluster.kind}) did not meet at {where} within {seconds:g} s; see that all of them "
            "were started, with the same address and number of processes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitStatus.PEER_LOST)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


ALONE = "this process alone"


def find_cluster(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> Cluster:
    """Describes the cluster by the arguments if they are given, else by environment variables.

    Raises:
      UserError: some but not all of the arguments are given, or they do not fit each other.
    """
    given = (coordinator, processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError("--coordinator, --processes and --process-id belong together: give all")
        if not 0 <= process_id < processes:
            raise UserError(f"--process-id must be from 0 to {processes - 1}, not {process_id}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise UserError(f"--coordinator must be HOST:PORT, not {coordinator}")
        return _explicit("flags", coordinator, processes, process_id)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm()
    if "tpu" in (_platforms() or "tpu"):
        if any(_names_hosts(name) for name in _TPU_HOSTS):
            return Cluster("Cloud TPU", {})
        if _has_tpu_chips() and importlib.util.find_spec("libtpu"):
            return Cluster("Cloud TPU VM", {})
    if any(name in os.environ for name in ("OMPI_MCA_orte_hnp_uri", "PMIX_SERVER_URI")):
        return Cluster("Open MPI", {})
    # A single process runs a coordinator too, at any free port: signals and checkpoints use JAX's
    # services in the same way as in a job of several.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    return _explicit(ALONE, address, 1, 0, coordinator_bind_address=address)


def _has_tpu_chips() -> bool:
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def leave_out_missing_tpu() -> None:
    """Keeps JAX from starting libtpu on a machine without a TPU, which would warn on stderr.

    Compiling for a TPU that is not there goes on working: it loads libtpu by itself.
    """
    if not _has_tpu_chips() and "tpu" not in _platforms():
        # There is no public way to leave out one platform and not to name the others.
        xla_bridge._backend_factories.pop("tpu", None)


def _platforms() -> str:
    """The platforms that JAX is told to look for; "" for all."""
    return jax.config.jax_platforms or ""


_TPU_HOSTS = ("MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES")


def _names_hosts(variable: str) -> bool:
    """Whether the variable names hosts. libtpu puts a warning there when it finds none."""
    return bool(os.environ.get(variable)) and "WARNING" not in os.environ[variable]


def _explicit(kind: str, address: str, processes: int, process_id: int, **more: Any) -> Cluster:
    arguments = {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }
    return Cluster(kind, {**arguments, **more})


def _slurm() -> Cluster:
    """Describes the processes of an `srun` step.

    JAX detects SLURM too, but then gives each process one GPU, also with one process per node.
    """
    number = int(os.environ["SLURM_JOB_ID"])
    # The same formula as JAX's: a port that differs between jobs which share a node.
    port = os.environ.get("JAX_COORDINATOR_PORT", str(61440 + number % 4096))
    # "node[001-004,007],other3" begins with node001.
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", os.environ["SLURM_STEP_NODELIST"])
    host = first[1] + (first[2] or "")
    tasks_here = int(re.match(r"\d+", os.environ["SLURM_STEP_TASKS_PER_NODE"])[0])
    local = {"local_device_ids": [int(os.environ["SLURM_LOCALID"])]} if tasks_here > 1 else {}
    count, process = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_PROCID"])
    return _explicit("SLURM", f"{host}:{port}", count, process, **local)


def _check_count(count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        raise UserError(
            f"the job has {count} processes and --expect-processes {expected} were expected; start "
            "it on all hosts, or see why some were not found"
        )


def _devices_are_in_use() -> bool:
    """Whether it is too late for `jax.distributed`, as in a notebook that has used JAX."""
    return xla_bridge.backends_are_initialized() and not jax.distributed.is_initialized()


def describe_processes(job: str) -> str:
    """Describes the processes of the job and their devices in a table, the same on all processes.

    A single process has no table. On GPUs a line about their memory follows.

    Args:
      job: the result of `initialize`.
    """
    row = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "devices": [device.device_kind for device in jax.local_devices()],
        "slices": sorted({getattr(d, "slice_index", 0) or 0 for d in jax.local_devices()}),
    }
    rows = agreement.gather(row)
    lines = [f"{len(rows)} processes, found by: {job}"] if len(rows) > 1 else []
    for number, row in enumerate(rows[:_TABLE_ROWS] if len(rows) > 1 else []):
        kinds = Counter(row["devices"])
        devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        where = f"slice {', '.join(map(str, row['slices']))}" if any(row["slices"]) else ""
        lines.append(f"  {number:>4}  {row['host']}  pid {row['pid']}  {devices}  {where}".rstrip())
    if len(rows) > _TABLE_ROWS:
        lines.append(f"  ... and {len(rows) - _TABLE_ROWS} more")
    if any(device.platform == "gpu" for device in jax.local_devices()):
        names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
        told = ", ".join(f"{name}={os.environ.get(name, 'not set')}" for name in names)
        lines.append(f"GPU memory: {told}; TensorFlow is kept off the GPUs")
    return "\n".join(lines)


def widen_cpu_thread_pool() -> None:
    """Gives XLA's CPU pool two threads for each CPU device of this process.

    All CPU devices share one pool, by default with one thread per core. A device that waits in a
    collective blocks a thread. If all threads are blocked, XLA aborts after 40 s. With two threads
    for each device, one can wait and one can compute. More threads cost time, because XLA splits
    each kernel into as many parts. XLA reads PJRT_NPROC when the first device is used.
    """
    devices = jax.config.jax_num_cpu_devices
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(2 * devices, os.cpu_count() or 1)))


def use_compilation_cache() -> str:
    """Keeps compiled programs on disk, so that the next start of the same run is quick.

    The folder is `JAX_COMPILATION_CACHE_DIR`, by default `~/.cache/vlp_jax/xla`. Returns the
    folder.
    """
    if not jax.config.jax_compilation_cache_dir:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlp_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return jax.config.jax_compilation_cache_dir
