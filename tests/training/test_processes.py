"""Two processes that form one job give the numbers of one process with as many devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vlp_jax import train
from vlp_jax.observe.jsonl import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = f"""
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load({str(ROOT / "configs" / "siglip_shapes.py")!r})).unlock()
    config.duration = duration(steps=5)
    config.mesh.update(replica=2, fsdp=2)
    for name in set(config.evaluators) - {{"retrieval", "zero_shot"}}:
        del config.evaluators[name]
    for evaluator in config.evaluators.values():
        evaluator.every = duration(steps=5)
    if arg:
        config.duration = duration(steps=20)
        tensor = 2 if arg == "fsdp_tp" else None
        config.mesh.update(preset=arg, replica=None, fsdp=None, tensor=tensor)
        config.evaluators = {{}}
    return config
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(config, workdir, shapes_dir, processes, devices=4, settings=()):
    """Starts the job."""
    port = free_port()
    # Each has the threads that a process of so many devices gives itself.
    environment = {k: v for k, v in os.environ.items() if k != "PJRT_NPROC"}
    started = []
    for index in range(processes):
        several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
        several += ["--process-id", str(index)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "vlp_jax.train", "--config", config]
                + [*settings, "--workdir", str(workdir), *(several if processes > 1 else [])],
                cwd=ROOT,
                env={
                    **environment,
                    "TFDS_DATA_DIR": shapes_dir,
                    "JAX_PLATFORMS": "cpu",
                    "JAX_NUM_CPU_DEVICES": str(devices // processes),
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def run(config, workdir, shapes_dir, processes, devices=4, settings=()):
    """Runs the job and returns its metrics by (step, name)."""
    started = start(config, workdir, shapes_dir, processes, devices, settings)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    # One that fails takes the others with it: what all have said tells which was the first.
    failed = [process.returncode != 0 for process in started]
    assert not any(failed), "\n".join(f"process {i}:\n{text}" for i, text in enumerate(outputs))
    return numbers_of(workdir)


def numbers_of(workdir):
    """(step, name) -> what is the same for any number of processes."""
    return {
        (record["step"], key): value
        for record in read_metrics(workdir / "metrics.jsonl")
        for key, value in record.items()
        if key.startswith(("train/loss", "train/grad_norm", "eval/"))
    }


def test_two_processes_equal_one(tmp_path, shapes_dir, monkeypatch):
    config = tmp_path / "several.py"
    config.write_text(CONFIG)
    settings = ["--config.log.every.steps=4"]
    devices = jax.devices
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: devices(*a)[:4])
        arguments = ["--config", str(config), "--workdir", str(tmp_path / "one"), *settings]
        assert train.main(arguments) == 0
    one = numbers_of(tmp_path / "one")
    settings += ["--config.steps_per_dispatch=3"]  # which the processes have to count alike
    two = run(str(config), tmp_path / "two", shapes_dir, 2, settings=settings)
    assert one.keys() == two.keys() and len(one) > 15
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4, atol=1e-6, err_msg=str(key))
    assert (tmp_path / "two" / "checkpoints" / "5").is_dir()


@pytest.mark.slow  # test_preemption.py has its parts
def test_two_processes_that_save_often_are_told_to_stop(tmp_path, shapes_dir):
    """One is told, both save the same step and end; whatever was saved before, and however many
    steps a program has."""
    config = tmp_path / "several.py"
    config.write_text(CONFIG)
    settings = [
        "--config.duration.steps=100000",
        *(f"--config.evaluators.{name}=None" for name in ("zero_shot", "retrieval")),
        "--config.log.every.steps=6",
        "--config.checkpoint.every.percent=None",
        "--config.checkpoint.every.steps=6",
        "--config.steps_per_dispatch=3",
    ]
    workdir = tmp_path / "run"
    first, second = started = start(str(config), workdir, shapes_dir, 2, settings=settings)
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "checkpoints" / "12").exists() and time.monotonic() < deadline:
            assert first.poll() is None and second.poll() is None
            time.sleep(0.2)
        second.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [75, 75], outputs
    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert all(f"saved step {newest}," in output for output in outputs), outputs


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_of_which_one_is_told_while_they_compile(tmp_path, shapes_dir, who, number):
    """Both end at once, and nothing is saved of what was not trained."""
    config = tmp_path / "several.py"
    config.write_text(CONFIG)
    workdir = tmp_path / "run"
    started = start(f"{config}:dp", workdir, shapes_dir, 2)
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "config.json").exists() and time.monotonic() < deadline:
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        started[who].send_signal(number)
        outputs = [process.communicate(timeout=30)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [75, 75], outputs
    assert all("told to stop while the run started" in output for output in outputs), outputs
    assert not any("Traceback" in output for output in outputs), outputs
    assert list((workdir / "checkpoints").iterdir()) == []


# A process reads its own part of a batch, so that `tensor` lies within one: four have two devices
# each there.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "processes", "devices"),
    [("dp", 2, 4), ("dp", 4, 4), ("fsdp", 2, 4), ("fsdp", 4, 4)]
    + [("fsdp_tp", 2, 4), ("fsdp_tp", 4, 8)],
)
def test_losses_of_twenty_steps_equal_those_of_one(
    tmp_path, shapes_dir, preset, processes, devices
):
    config = tmp_path / "several.py"
    config.write_text(CONFIG)
    one = run(f"{config}:{preset}", tmp_path / "one", shapes_dir, 1, devices)
    several = run(f"{config}:{preset}", tmp_path / "several", shapes_dir, processes, devices)
    losses = [key for key in one if key[1] == "train/loss"]
    assert len(losses) == 20 and abs(one[0, "train/loss"] - one[19, "train/loss"]) > 0.1
    assert several.keys() == one.keys()
    for key in one:
        np.testing.assert_allclose(several[key], one[key], rtol=1e-4, err_msg=str(key))
