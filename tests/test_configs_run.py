"""Every config in configs/ trains two steps on 8 devices, is saved, and goes on on another mesh."""

from pathlib import Path

import jax
import numpy as np
import pytest

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel.batch import put_batch
from vlp_jax.train import train
from vlp_jax.training.build import build, first_state, make_checkpointer
from vlp_jax.training.step import compile_step

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))


def third_loss(config, workdir, state=None):
    """Loss of the step after the checkpoint in `workdir`, from `state` or what is restored."""
    parts = build(config, workdir, StartupClock())
    setup = parts.setup
    if state is None:
        with make_checkpointer(config, workdir) as checkpointer:
            step = checkpointer.check_fits(setup.abstract)
            assert step == 2
            state = first_state(parts, checkpointer, step)
    batch = next(parts.pipeline.batches(2))
    step_function = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
    total, count = step_function(state, put_batch(batch, setup.mesh))[1]["loss"]
    return float(total / count), setup


# The others are larger forms of this one, or of what other tests train; they are slow tests.
FAST = {"demo"}
MARKED = [pytest.param(n, marks=pytest.mark.slow) if n not in FAST else n for n in CONFIGS]


@pytest.mark.parametrize("name", MARKED)
def test_smoke_save_and_restore_on_another_mesh(name, tmp_path, shapes_dir):
    config = smoke_lib.smoke(config_lib.load(str(ROOT / "configs" / f"{name}.py")))
    live = train(config, tmp_path, StartupClock())
    assert int(live.step) == 2
    records = (tmp_path / "metrics.jsonl").read_text()
    assert all(f"eval/{evaluator}/" in records for evaluator in config.evaluators)
    expected, _ = third_loss(config, tmp_path, state=live)
    with config.unlocked():
        config.mesh.update(replica=2, fsdp=4)
    restored, setup = third_loss(config, tmp_path)
    assert setup.mesh.shape["fsdp"] == 4
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(setup.abstract.params)]
    assert any("fsdp" in spec for spec in specs)
    np.testing.assert_allclose(restored, expected, rtol=1e-5)
