"""What a run measures about itself: in one process, set back, and in two of which one is slow."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from test_processes import free_port

from vlp_jax import config as config_lib
from vlp_jax import train
from vlp_jax.errors import UserError
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.observe.progress import NullProgress
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.training.measures import Measures, profile_steps, take_profile_flag
from vlp_jax.training.monitor import Monitor

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 12
CONFIG = f"""
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load({str(ROOT / "configs" / "siglip_shapes.py")!r})).unlock()
    config.duration = duration(steps={STEPS})
    config.log.every = duration(steps=2)
    config.checkpoint.every = duration(steps=4)
    config.checkpoint.keep_last = 3
    config.garbage_collection_every = 5
    config.profile.steps_on_signal = 2
    for name in set(config.evaluators) - {{"retrieval"}}:
        del config.evaluators[name]
    config.evaluators.retrieval.every = duration(steps=12)
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "measured.py"
    file.write_text(CONFIG)
    return file


def act_at(monkeypatch, actions):
    """Has the loop call `actions[step]` when it hands over batch `step`."""
    take = Monitor.end_step

    def acting(self, step, metrics):
        actions.get(step, lambda: None)()
        return take(self, step, metrics)

    monkeypatch.setattr(Monitor, "end_step", acting)


def send():
    os.kill(os.getpid(), signal.SIGUSR1)


def test_what_a_run_measures(config_file, shapes_dir, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    arguments = ["--config", str(config_file), "--workdir", str(workdir)]
    collected, freezing = [], []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *a: (collected.append(1), collect(*a)))
    # The process of the test is older than the run that it stands for.
    monkeypatch.setattr("vlp_jax.observe.throughput._process_age", lambda: 0.0)
    look = {8: lambda: freezing.append((gc.isenabled(), gc.get_freeze_count() > 0))}
    act_at(monkeypatch, {6: send, 7: send, 11: send, **look})
    assert train.main([*arguments, "--profile", "2:3"]) == 0

    printed = capsys.readouterr().err
    assert f"trace of steps 2 to 3 in {workdir / 'profile'}: " in printed
    assert "tracing steps 7 to 8" in printed and "the signal is dropped" in printed
    assert "steps 11" not in printed and "steps 12" not in printed
    assert len(list(workdir.glob("profile/plugins/profile/*/*.xplane.pb"))) == 2
    assert len(collected) >= 3  # on entering, at step 5 and at step 10
    assert freezing == [(False, True)] and gc.isenabled() and gc.get_freeze_count() == 0

    records = read_metrics(workdir / "metrics.jsonl")
    logged = [r for r in records if "train/loss" in r]
    for record in logged:
        total = sum(v for k, v in record.items() if k.endswith("_seconds") and "goodput/" in k)
        useful = record["goodput/useful_seconds"]
        assert record["goodput/useful_fraction"] == pytest.approx(useful / total)
        assert record["memory/host_rss_bytes"] > 2**26 and record["compile/programs"] > 0
        assert "perf/step_seconds_min" not in record  # there is but one process
    assert [r["step"] for r in logged if "compile/step_seconds" in r] == [0]
    assert logged[-1]["goodput/checkpoint_seconds"] > 0

    summary = json.loads((workdir / "summary.json").read_text())
    block = printed[printed.index("summary: complete") :]
    assert (summary["first_step"], summary["last_step"], summary["examples"]) == (0, 12, 12 * 16)
    assert summary["outcome"] == "complete" and summary["speed"]["perf/mfu"] > 0
    assert f"{STEPS} of {STEPS}; this start did 12 with 192 examples" in block
    assert str(workdir / "checkpoints") in block and "all 2 starts" not in block
    for cause in ("useful", "start", "compile", "checkpoint", "evaluation", "profiling"):
        assert f"    {cause} " in block and summary["seconds"][cause] > 0, cause
    assert "garbage collection" in summary["seconds"]


@pytest.mark.slow  # tests/observe/test_goodput.py has the ledger
def test_a_run_that_is_set_back(config_file, shapes_dir, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    arguments = ["--config", str(config_file), "--workdir", str(workdir)]
    monkeypatch.setattr("vlp_jax.observe.throughput._process_age", lambda: 0.0)
    assert train.main(arguments) == 0
    shutil.rmtree(workdir / "checkpoints" / "12")
    act_at(monkeypatch, {9: lambda: (_ for _ in ()).throw(UserError("enough"))})
    assert train.main(arguments) == 2
    ledger = json.loads((workdir / "goodput.json").read_text())
    assert (ledger["starts"], ledger["steps_lost"]) == (2, 4)
    assert ledger["steps_done"] == 12 + 1 and ledger["ended"] == "enough"  # batch 8; 9 was not told
    assert ledger["seconds"]["lost work"] > 0
    total = sum(ledger["seconds"].values())
    assert total == pytest.approx(ledger["alive_at"] - ledger["began_at"], rel=0.02)
    printed = capsys.readouterr().err
    assert "all 2 starts" in printed and "4 of earlier starts were lost and done again" in printed
    assert json.loads((workdir / "summary.json").read_text())["outcome"] == "enough"


def test_a_mistake_before_the_loop_is_in_the_ledger_and_has_no_summary(tmp_path, capsys):
    startup, progress = StartupClock(), NullProgress()
    measures = Measures(config_lib.base(), epath.Path(tmp_path), startup, progress)
    with pytest.raises(UserError), measures:
        measures.begin(0, 10)
        raise UserError("no writer")
    assert json.loads((tmp_path / "goodput.json").read_text())["ended"] == "no writer"
    assert os.listdir(tmp_path) == ["goodput.json"]


def test_the_flag_and_the_config_agree_or_contradict():
    config = config_lib.base()
    take_profile_flag(config, None)
    assert profile_steps(config) is None
    take_profile_flag(config, (10, 15))
    take_profile_flag(config, (10, 15))
    assert profile_steps(config) == (10, 15)
    with pytest.raises(UserError, match="contradicts config.profile, which has first=10"):
        take_profile_flag(config, (10, 16))
    config.profile.steps_on_signal = 0
    with pytest.raises(UserError, match="steps_on_signal"):
        profile_steps(config)


def test_a_config_of_before_these_keys_is_loaded():
    saved = json.loads(config_lib.to_json(config_lib.base()))
    del saved["garbage_collection_every"], saved["profile"]["steps_on_signal"]
    config = config_lib.from_json(json.dumps(saved))
    assert config.garbage_collection_every == 1000 and config.profile.steps_on_signal == 5


# One process of the job gets each batch long after the others, also on a machine that is busy.
SLOW_DATA = """
import sys, time
if sys.argv[-1] == "1":
    from vlp_jax.parallel import batch
    take = batch.Prefetcher.__next__
    batch.Prefetcher.__next__ = lambda self: (time.sleep(1), take(self))[1]
from vlp_jax.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_process_that_holds_the_others_back_is_named(config_file, shapes_dir, tmp_path):
    workdir, port = tmp_path / "run", free_port()
    arguments = ["--config", str(config_file), "--workdir", str(workdir), "--processes", "2"]
    arguments += [
        "--config.evaluators.retrieval=None",
        "--config.duration.steps=9",
        "--coordinator",
        f"127.0.0.1:{port}",
    ]
    environment = {
        **os.environ,
        "TFDS_DATA_DIR": shapes_dir,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_DATA, *arguments, "--process-id", str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    first, second = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], first + second
    assert "warning: process 1 on host" in first and "waits for its data" in first, first
    assert "process 0 on host" not in first
    assert "summary: complete" in first and "summary" not in second
    logged = [r for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r]
    # A machine that is busy may need longer for a step than the data does. Not for all of them.
    last = max(logged[1:-1], key=lambda r: r["perf/data_wait_fraction_max"])
    assert last["perf/data_wait_fraction_max"] > last["perf/data_wait_fraction"] + 0.15
    assert last["perf/device_wait_fraction_min"] < last["perf/device_wait_fraction"] - 0.15
    assert (
        last["perf/step_seconds_min"] <= last["perf/step_seconds"] <= last["perf/step_seconds_max"]
    )
    assert json.loads((workdir / "goodput.json").read_text())["starts"] == 1
