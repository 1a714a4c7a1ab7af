"""Training on damaged data: it completes, counts what was damaged, and resumes without a change."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import corpora
import damage
import pytest

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.train import train

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = damage.COUNT // 16  # an epoch
OPS = {"decode_image": {}, "resize": {"size": 16}, "keep": {"fields": ("image", "text")}}


def config_of(data, steps=STEPS, mesh=None):
    config = smoke_lib.smoke(config_lib.load(str(ROOT / "configs" / "clip_shapes.py"))).unlock()
    config.duration = config_lib.duration(steps=steps)
    config.checkpoint.every = config_lib.duration(steps=5)
    config.checkpoint.keep_last = 10
    config.tokenizer = {"name": "bytes", "context_length": 16}
    config.objective.text.pooling = "eos"
    config.evaluators = {}
    config.mesh.update(mesh or {})
    config.data = {**config_lib.DATA_DEFAULTS, **data, "preprocess": OPS}
    return config.lock()


def metrics(workdir, prefix):
    return {
        (record["step"], key): value
        for record in read_metrics(workdir / "metrics.jsonl")
        for key, value in record.items()
        if key.startswith(prefix)
    }


def counts(workdir, step=STEPS - 1):
    found = metrics(workdir, "data/bad/")
    return {
        key.removeprefix("data/bad/data/").replace("_", " "): int(value)
        for (at, key), value in found.items()
        if at == step
    }


@pytest.mark.slow  # test_input_state.py has the counts
@pytest.mark.parametrize("kind", ["webdataset", "parquet", "tfrecord"])
def test_it_completes_and_resumes(kind, tmp_path):
    data = damage.write(kind, tmp_path)
    straight = tmp_path / "straight"
    state = train(config_of(data), straight, StartupClock())
    assert int(state.step) == STEPS and counts(straight) == damage.counts(kind)
    losses = metrics(straight, "train/loss")
    assert len(losses) == STEPS

    # As it was at step 5, a kill later.
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    for folder in (resumed / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > 5:
            shutil.rmtree(folder)
    saved = json.loads(next((resumed / "checkpoints" / "5" / "input").iterdir()).read_text())
    assert saved["position"] == 80 and 0 < len(saved["bad"]) <= len(damage.COUNTS)
    size = sum(f.stat().st_size for f in (resumed / "checkpoints" / "5" / "input").rglob("*"))
    assert size < 64 * 1024
    train(config_of(data), resumed, StartupClock())
    assert metrics(resumed, "train/loss") == losses
    assert counts(resumed) == damage.counts(kind)


@pytest.mark.slow
def test_all_damaged_ends_soon_with_one_line(tmp_path):
    rows = [{**row, "image": b"junk"} for row in corpora.examples(60)]
    data = corpora.config("webdataset", tmp_path, rows)
    file = tmp_path / "config.py"
    file.write_text(
        "from vlp_jax.config import from_json\ndef get_config(arg=None):\n"
        f"    return from_json({config_lib.to_json(config_of(data))!r})\n"
    )
    command = [sys.executable, "-m", "vlp_jax.train", "--config", str(file)]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment(),
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    # Which of the two it is depends on how far ahead the input is.
    told = "could not be used" in last or "no example can be used" in last
    assert done.returncode == 2 and told, done.stderr
    assert "undecodable image" in last and ".tar" in last


@pytest.mark.slow  # test_input_state.py has the check
def test_other_data_is_not_taken_for_that_of_the_checkpoint(tmp_path):
    data = corpora.config("tfrecord", tmp_path, corpora.examples(64))
    train(config_of(data, steps=5), tmp_path / "run", StartupClock())
    more = corpora.config("tfrecord", tmp_path / "more", corpora.examples(70))
    from vlp_jax.errors import UserError

    config = config_of(more, steps=8)
    with pytest.raises(UserError, match="changed since the checkpoint.*accept_other_data"):
        train(config, tmp_path / "run", StartupClock())
    with config.unlocked():
        config.checkpoint.accept_other_data = True
    assert int(train(config, tmp_path / "run", StartupClock()).step) == 8


def environment(devices=1):
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
    }


@pytest.mark.slow
def test_two_processes_count_together_and_one_goes_on(tmp_path):
    """Counts are those of one process; what two have saved, one resumes."""
    data = damage.write("webdataset", tmp_path)
    alone = tmp_path / "alone"
    mesh = {"replica": 2, "fsdp": 2, "tensor": 1}
    train(config_of(data), alone, StartupClock())
    file = tmp_path / "config.py"
    file.write_text(
        "from vlp_jax.config import from_json\ndef get_config(arg=None):\n"
        f"    return from_json({config_lib.to_json(config_of(data, steps=10, mesh=mesh))!r})\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = tmp_path / "both"
    command = [sys.executable, "-m", "vlp_jax.train", "--config", str(file), "--workdir", str(both)]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
    jobs = [
        subprocess.Popen(
            [*command, str(index)], cwd=ROOT, env=environment(2),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    for job in jobs:
        output = job.communicate(timeout=300)[0]
        assert job.returncode == 0, output
    assert counts(both, 9) == counts(alone, 9)
    train(config_of(data), both, StartupClock())
    assert counts(both) == damage.COUNTS
