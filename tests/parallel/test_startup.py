"""How the processes of a job find each other, and what is said when they do not."""

import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel import startup

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ("SLURM_", "OMPI_", "PMIX_", "TPU_", "MEGASCALE_")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(CLUSTER):
            monkeypatch.delenv(name)


def test_alone():
    cluster = startup.find_cluster()
    assert cluster.kind == startup.ALONE and cluster.arguments["num_processes"] == 1
    assert cluster.arguments["coordinator_bind_address"].startswith("127.0.0.1:")


def test_flags_come_before_the_cluster(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    cluster = startup.find_cluster("host:1", 2, 1)
    assert cluster.kind == "flags" and cluster.arguments["process_id"] == 1
    assert cluster.arguments["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "belong together"),
        ((None, 2, 1), "belong together"),
        (("host:1", 2, 2), "from 0 to 1, not 2"),
        (("host", 2, 1), "HOST:PORT, not host"),
    ],
)
def test_flags_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        startup.find_cluster(*arguments)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[001-004]", "node001"),
        ("node[007,009-011],other1", "node007"),
        ("alpha,beta", "alpha"),
        ("gpu-a1", "gpu-a1"),
    ],
)
def test_slurm(monkeypatch, nodes, host):
    for name, value in {**SLURM, "SLURM_STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(name, value)
    cluster = startup.find_cluster()
    assert cluster.kind == "SLURM"
    assert cluster.arguments["coordinator_address"] == f"{host}:61441"
    assert (cluster.arguments["num_processes"], cluster.arguments["process_id"]) == (16, 5)
    assert cluster.arguments["local_device_ids"] == [
        1
    ]  # a GPU for each of the four tasks of a node


def test_slurm_with_one_task_a_node_takes_all_of_its_gpus(monkeypatch):
    for name, value in {**SLURM, "SLURM_STEP_NODELIST": "a,b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x16)")
    assert "local_device_ids" not in startup.find_cluster().arguments


def test_a_step_of_one_task_is_no_job_of_several(monkeypatch):
    for name, value in {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert startup.find_cluster().kind == startup.ALONE


@pytest.mark.parametrize(
    ("name", "kind"), [("TPU_WORKER_HOSTNAMES", "Cloud TPU"), ("PMIX_SERVER_URI", "Open MPI")]
)
def test_other_clusters_are_left_to_jax(monkeypatch, name, kind):
    monkeypatch.setenv(name, "a,b")
    monkeypatch.setattr(startup, "_platforms", lambda: "")
    cluster = startup.find_cluster()
    assert cluster.kind == kind and cluster.arguments == {}


def run(*arguments):
    code = f"""
import sys
from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command
def command():
    print(startup.initialize(*{arguments!r}, join_seconds=2, expected=1))
    import jax
    print(jax.process_count(), jax.distributed.is_initialized(), float(jax.numpy.ones(3).sum()))
sys.exit(run_command(command))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_one_process_has_the_services_of_a_job():
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{startup.ALONE}\n1 True 3.0\n"


def test_a_coordinator_that_cannot_be_reached():
    began = time.monotonic()
    done = run("127.0.0.1:9", 2, 1)
    assert done.returncode == 76, (done.returncode, done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: no process 0 at 127.0.0.1:9 within 2 s: Connection refused")
    assert time.monotonic() - began < 60


def test_processes_that_do_not_come():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    done = run(address, 2, 0)
    assert done.returncode == 76, (done.returncode, done.stderr)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the 2 processes of the job (flags) did not meet at " + address)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
    assert done.returncode == 2
    assert "process 0 cannot listen at" in done.stderr and "another port" in done.stderr


def test_a_job_of_another_size_is_refused():
    with pytest.raises(UserError, match="has 1 processes and --expect-processes 4 were expected"):
        startup.initialize(expected=4)


def test_a_process_alone_has_no_table_and_gpus_a_line_about_memory(monkeypatch):
    assert startup.describe_processes(startup.ALONE) == ""
    gpu = types.SimpleNamespace(device_kind="NVIDIA H100", platform="gpu")
    monkeypatch.setattr(startup.jax, "local_devices", lambda: [gpu])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    assert startup.describe_processes(startup.ALONE) == (
        "GPU memory: XLA_PYTHON_CLIENT_PREALLOCATE=not set, XLA_PYTHON_CLIENT_MEM_FRACTION=0.9; "
        "TensorFlow is kept off the GPUs"
    )


def test_a_command_does_not_begin_with_the_warnings_of_libtpu():
    pytest.importorskip("libtpu")
    code = (
        "import jax; from vlp_jax.training.command import run_command; "
        "run_command(lambda: print(jax.devices()[0].platform))"
    )
    environment = {k: v for k, v in os.environ.items() if "TPU" not in k and k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split()[-1] in ("cpu", "gpu") and done.stderr == ""


def test_what_libtpu_says_where_there_is_no_tpu_is_no_cluster(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "WARNING: could not determine TPU worker hostnames")
    assert startup.find_cluster().kind == startup.ALONE


def test_a_tpu_that_is_not_wanted_is_not_looked_for(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert startup.jax.config.jax_platforms == "cpu"  # as all tests run
    assert startup.find_cluster().kind == startup.ALONE


def test_each_cpu_device_has_two_threads(monkeypatch):
    """One may wait in a collective; conftest sets as many for the tests' own eight."""
    assert os.environ["PJRT_NPROC"] == str(2 * jax.config.jax_num_cpu_devices)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("PJRT_NPROC")
    startup.widen_cpu_thread_pool()
    assert os.environ["PJRT_NPROC"] == "16"
    startup.widen_cpu_thread_pool()  # what is set already stays
    monkeypatch.setenv("PJRT_NPROC", "5")
    startup.widen_cpu_thread_pool()
    assert os.environ["PJRT_NPROC"] == "5"
