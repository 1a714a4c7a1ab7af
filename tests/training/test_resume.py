"""Killed anywhere and started again, a run is bit for bit the one that was never disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vlp_jax import train
from vlp_jax.training.monitor import Monitor

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 60
CONFIG = f"""
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load({str(ROOT / "configs" / "clip_shapes.py")!r})).unlock()
    config.duration = duration(steps={STEPS})
    config.checkpoint.every = duration(steps=7)
    config.optimizer.ema_decay = 0.9
    for name in set(config.evaluators) - {{"retrieval", "zero_shot"}}:
        del config.evaluators[name]
    for evaluator in config.evaluators.values():
        evaluator.every = duration(steps=25)
    return config
"""
# Keeps the machine from finishing all steps before a kill can fall between them.
SLOWLY = """
import sys, time
from vlp_jax.training.monitor import Monitor
take = Monitor.end_step
Monitor.end_step = lambda self, *a: (time.sleep(0.05), take(self, *a))
from vlp_jax.train import main
sys.exit(main(sys.argv[1:]))
"""

# Is told to stop by itself when a function is called for the n-th time: "MODULE:NAME" n SIGNAL.
TOLD = """
import functools, importlib, os, sys
from vlp_jax import signals, train
signals.listen()
(place, count, number), sys.argv[1:] = sys.argv[1:4], sys.argv[4:]
module, _, name = place.partition(":")
*owners, name = name.split(".")
owner = functools.reduce(getattr, owners, importlib.import_module(module))
whole, calls = getattr(owner, name), []
def told(*arguments, **more):
    calls.append(1)
    if len(calls) == int(count):
        print("it is told now", flush=True)
        os.kill(os.getpid(), int(number))
    return whole(*arguments, **more)
setattr(owner, name, told)
sys.exit(train.main(sys.argv[1:]))
"""
MOMENTS = {
    "opens the data": ("vlp_jax.training.setup:make_pipeline", 1),
    "compiles": ("vlp_jax.training.setup:compile_steps", 1),
    "makes the state": ("vlp_jax.training.setup:init_state", 1),
    "first step": ("vlp_jax.training.monitor:Monitor.end_step", 1),
    "evaluates": ("vlp_jax.evaluators.retrieval:Retrieval.__call__", 2),
    "saves": ("vlp_jax.training.checkpoint:Checkpointer.save", 3),
    "writes checksums": ("vlp_jax.training.checkpoint_files:write_checksums", 2),
    "last step": ("vlp_jax.training.monitor:Monitor.end_step", STEPS),
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("configs") / "resumed.py"
    file.write_text(CONFIG)
    return file


def start(config_file, workdir, shapes_dir, slowly=False, told=()):
    program = ["-c", SLOWLY] if slowly else ["-m", "vlp_jax.train"]
    program = ["-c", TOLD, *map(str, told)] if told else program
    return subprocess.Popen(
        [sys.executable, *program, "--config", str(config_file), "--workdir", str(workdir)],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "PJRT_NPROC"},
            "TFDS_DATA_DIR": shapes_dir,
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, status=0):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == status, output
    return output


def losses(workdir):
    """step -> every metric that is a pure function of the state and the data."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if key.startswith(("train/", "eval/")):
                assert (record["step"], key) not in found, "logged twice"
                found[record["step"], key] = value
    return found


def steps_logged(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b'"train/loss"') if file.exists() else 0


def assert_same_parameters(workdir, other, step=STEPS):
    """All arrays of the last checkpoint are equal, as Orbax reads them, with none of our code."""
    with ocp.StandardCheckpointer() as checkpointer:
        ours, others = (
            checkpointer.restore(folder.absolute() / "checkpoints" / str(step) / "state")
            for folder in (workdir, other)
        )
    jax.tree.map(np.testing.assert_array_equal, ours, others)


@pytest.fixture(scope="module")
def undisturbed(config_file, shapes_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(config_file, workdir, shapes_dir))
    return workdir


def assert_same_run(workdir, undisturbed):
    assert losses(workdir) == losses(undisturbed)
    assert len([key for _, key in losses(workdir) if key == "train/loss"]) == STEPS
    assert_same_parameters(workdir, undisturbed)


def assert_time_adds_up(workdir, starts):
    """The ledger has all steps and seconds of all processes, killed ones among them."""
    ledger = json.loads((workdir / "goodput.json").read_text())
    assert ledger["starts"] == starts and ledger["ended"] == "complete"
    assert ledger["step"] == STEPS == ledger["steps_done"] - ledger["steps_lost"]
    seconds = ledger["seconds"]
    assert sum(seconds.values()) == pytest.approx(ledger["alive_at"] - ledger["began_at"], abs=1)
    assert seconds["start"] > 0 and seconds["useful"] > 0 and seconds["down"] > 0


def killed_until_done(config_file, workdir, shapes_dir, kills, seed):
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(config_file, workdir, shapes_dir, slowly=True)
        until = min(STEPS - 4, steps_logged(workdir) + rng.randint(5, 20))
        while process.poll() is None and steps_logged(workdir) < until:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))  # anywhere: within a step, a save, a line
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(start(config_file, workdir, shapes_dir))


@pytest.mark.slow
def test_killed_twice_and_resumed(config_file, undisturbed, shapes_dir, tmp_path):
    killed_until_done(config_file, tmp_path, shapes_dir, kills=2, seed=0)
    assert_same_run(tmp_path, undisturbed)
    assert_time_adds_up(tmp_path, starts=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_often_and_resumed(config_file, undisturbed, shapes_dir, tmp_path, seed):
    killed_until_done(config_file, tmp_path, shapes_dir, kills=5, seed=seed)
    assert_same_run(tmp_path, undisturbed)


def test_a_run_that_is_told_to_stop_goes_on_bit_for_bit(
    config_file, shapes_dir, tmp_path, monkeypatch, capsys
):
    """In this process: the slow tests start one for each part of a run."""
    take, devices, workdirs = Monitor.end_step, jax.devices, []
    monkeypatch.setattr(jax, "devices", lambda *a: devices(*a)[:2])

    def stopped_at_10(self, step, metrics):
        if step == 10 and workdirs == ["stopped"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step, metrics)

    monkeypatch.setattr(Monitor, "end_step", stopped_at_10)
    settings = ["--config.duration.steps=16", "--config.evaluators.zero_shot=None"]
    settings += ["--config.evaluators.retrieval.every.steps=6"]
    for name, status in (("stopped", 75), ("stopped", 0), ("straight", 0)):
        workdirs.append(name)
        arguments = ["--config", str(config_file), "--workdir", str(tmp_path / name), *settings]
        assert train.main(arguments) == status
        saved = {int(p.name) for p in (tmp_path / name / "checkpoints").iterdir()}
        # Saved where it was, not at the last regular checkpoint.
        assert max(saved) == (11 if status else 16)
    assert "saved step 11, run the same command to go on" in capsys.readouterr().err
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert_same_parameters(tmp_path / "stopped", tmp_path / "straight", 16)


@pytest.mark.slow
def test_told_to_stop_saves_and_asks_to_be_restarted(
    config_file, undisturbed, shapes_dir, tmp_path
):
    process = start(config_file, tmp_path, shapes_dir, slowly=True)
    while process.poll() is None and steps_logged(tmp_path) < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "run the same command to go on" in finish(process, status=75)
    stopped_at = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert stopped_at % 7  # saved where it was, not at the last regular checkpoint
    finish(start(config_file, tmp_path, shapes_dir))
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_told_to_stop_at_every_moment(
    config_file, undisturbed, shapes_dir, tmp_path, moment, number
):
    told = (*MOMENTS[moment], number.value)
    output = finish(start(config_file, tmp_path, shapes_dir, told=told), status=75)
    after = output.partition("it is told now")[2]
    assert after and "Traceback" not in output
    assert output.count("run the same command to go on") >= 1
    finish(start(config_file, tmp_path, shapes_dir))
    assert_same_run(tmp_path, undisturbed)
