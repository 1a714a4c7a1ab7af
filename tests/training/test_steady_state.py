"""In a run that is under way nothing is compiled, and nothing moves to or from devices unasked."""

import json
import threading
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.array import ArrayImpl

from vlp_jax import train
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.parallel import startup
from vlp_jax.training import loop

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, PERIOD = 9, 3
CONFIG = f"""
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load({str(ROOT / "configs" / "siglip_shapes.py")!r})).unlock()
    config.duration = duration(steps={STEPS})
    config.checkpoint.every = duration(steps={PERIOD})
    for name in set(config.evaluators) - set((arg or "retrieval,zero_shot").split(",")):
        del config.evaluators[name]
    for evaluator in config.evaluators.values():
        evaluator.every = duration(steps={PERIOD})
    return config
"""
# What reads an array on the host. On a CPU no transfer guard sees it, for nothing is copied.
READS = ("__array__", "__float__", "__int__", "__bool__", "__index__", "__iter__", "item", "tolist")


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "steady.py"
    file.write_text(CONFIG)
    return file


def before_each_batch(monkeypatch, act):
    """Has the loop call `act(step)` before it looks what is due at `step`."""
    evaluate = loop.Loop.evaluate

    def acting(self, step, state):
        act(step)
        return evaluate(self, step, state)

    monkeypatch.setattr(loop.Loop, "evaluate", acting)


class ImplicitReads:
    """Notes who of us reads an array on the host but through `jax.device_get`, in any thread."""

    def __init__(self, monkeypatch):
        self.found, self.on = [], False
        self._asked = threading.local()
        device_get = jax.device_get

        def asked(x):
            self._asked.now = True
            try:
                return device_get(x)
            finally:
                self._asked.now = False

        monkeypatch.setattr(jax, "device_get", asked)
        for name in READS:
            monkeypatch.setattr(ArrayImpl, name, self._noting(getattr(ArrayImpl, name)))

    def _noting(self, method):
        def read(array, *arguments, **more):
            if self.on and not getattr(self._asked, "now", False):
                caller = traceback.extract_stack(limit=2)[0]
                if "/vlp_jax/" in caller.filename:
                    self.found.append(f"{caller.filename}:{caller.lineno}: {caller.line}")
            return method(array, *arguments, **more)

        return read


SLOW = "few_shot,geometry,knn,linear_probe,retrieval_captions"


@pytest.mark.parametrize("chosen", ["", pytest.param(f":{SLOW}", marks=pytest.mark.slow)])
def test_nothing_is_compiled_and_nothing_moves_unasked(
    chosen, config_file, shapes_dir, tmp_path, monkeypatch, capsys
):
    """What is compiled between two steps after all, before the last one here, is told."""
    workdir = tmp_path / "run"
    # JAX lets what is handed to a program of several devices pass its guard.
    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda *a: devices(*a)[:1])
    reads = ImplicitReads(monkeypatch)
    programs = {}

    def look(step):
        programs[step] = watch.so_far().programs
        if step == STEPS - 1:
            reads.on = False
            jax.config.update("jax_transfer_guard", "allow")
            jax.jit(lambda x: jnp.sin(x) * 1.25).lower(jnp.ones(STEPS)).compile()
        if step == 2:
            jax.config.update("jax_transfer_guard", "disallow")
            reads.on = True

    before_each_batch(monkeypatch, look)
    try:
        with CompileWatch() as watch:
            assert (
                train.main(["--config", f"{config_file}{chosen}", "--workdir", str(workdir)]) == 0
            )
            programs[STEPS + 1] = watch.so_far().programs
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        reads.on = False
    assert sorted(set(reads.found)) == []
    # Evaluators and the checkpoint are compiled for when they first run, before batch PERIOD.
    new = {step: programs[step + 1] - programs[step] for step in range(2, STEPS + 1)}
    assert {step for step, count in new.items() if count} == {PERIOD, STEPS - 1}
    records = read_metrics(workdir / "metrics.jsonl")
    assert {r["step"] for r in records if any(k.startswith("eval/") for k in r)} == {3, 6, 9}
    told = [r["compile/between_steps"] for r in records if "train/loss" in r]
    # The metrics of the step before it are read after it.
    assert told[:-2] == [0] * (STEPS - 2) and told[-1] >= 1
    notes = json.loads((workdir / "summary.json").read_text())["notes"]
    assert notes["programs compiled between steps"] == told[-1]
    assert "was compiled between two steps" in capsys.readouterr().err


def test_the_guards_of_this_file_see_what_they_should(monkeypatch):
    ours = compile("def read(x):\n    return float(x)\n", "/x/vlp_jax/y.py", "exec")
    names = {}
    exec(ours, names)
    reads = ImplicitReads(monkeypatch)
    x = jnp.float32(2)
    reads.on = True
    assert names["read"](x) == 2 and jax.device_get(x) == 2
    reads.on = False
    assert len(reads.found) == 1 and reads.found[0].startswith("/x/vlp_jax/y.py:2")
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        jax.jit(lambda x: x + 1)(1.0)


def test_the_command_keeps_compiled_programs_by_default(monkeypatch, tmp_path):
    """`python -m vlp_jax.train` turns the persistent cache on before it trains."""
    before = jax.config.jax_compilation_cache_dir
    seen = []
    monkeypatch.setattr(startup, "initialize", lambda *a, **more: startup.ALONE)
    monkeypatch.setattr(
        train, "train", lambda *a: seen.append(jax.config.jax_compilation_cache_dir)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        config = str(ROOT / "configs" / "demo.py")
        assert train.main(["--config", config, "--workdir", str(tmp_path / "run")]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    assert seen == [str(tmp_path / "vlp_jax" / "xla")]
    assert jax.config.jax_enable_compilation_cache
