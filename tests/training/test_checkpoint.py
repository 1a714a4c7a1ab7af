"""Checkpoints: what is kept, what comes back, and what is refused."""

import helpers
import jax
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.checkpoint import Checkpointer, absolute
from vlp_jax.training.restore import mismatch_report


def setup_with(**objective):
    return helpers.setup_on(helpers.tiny_config(**objective), {"replica": 8})


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path):
    setup = setup_with()
    state, _ = helpers.train(setup, 3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, input_state={"position": 48})
    other = helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 4})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.check_fits(other.abstract) == 3
        restored = checkpointer.restore(other.abstract, 3)
        assert checkpointer.input_state(3) == {"position": 48}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(other.abstract)):
        assert leaf.sharding == wanted.sharding


def test_saving_is_not_disturbed_by_the_step_that_takes_over_the_memory(tmp_path):
    setup = setup_with()
    step, state = helpers.compiled(setup), helpers.fresh(setup)
    wanted = jax.device_get(jax.tree.map(lambda x: np.array(x), state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, input_state={"position": 0})
        for batch in helpers.batches(5):  # while the save may still be writing
            state, _ = step(state, put_batch(batch, setup.mesh))
        checkpointer.wait()
        restored = checkpointer.restore(setup.abstract, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), wanted)


def test_which_checkpoints_are_kept(tmp_path):
    setup = setup_with()
    state = helpers.fresh(setup)
    with Checkpointer(tmp_path, keep_last=2, keep_every=4) as checkpointer:
        for step in range(1, 11):
            checkpointer.save(step, state, input_state={"position": step})
        checkpointer.save(10, state, input_state={"position": 10})  # already there: nothing happens
        checkpointer.wait()
        assert checkpointer.steps() == [4, 8, 9, 10]


def test_unfinished_checkpoints_do_not_count(tmp_path):
    setup = setup_with()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, helpers.fresh(setup), input_state={"position": 0})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-7" / "state").mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.check_fits(setup.abstract) == 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"embed_dim": 24}, ["params/image_projection/kernel is (32, 16)", "and (32, 24)"]),
        ({"loss": "sigmoid"}, ["params/logit_bias is absent in the checkpoint and ()"]),
    ],
)
def test_another_models_checkpoint_is_refused_with_both_shapes(tmp_path, changes, parts):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, helpers.fresh(setup_with()), input_state={"position": 0})
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError) as error:
        checkpointer.check_fits(setup_with(**changes).abstract)
    assert "belongs to another model" in str(error.value) and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_long_reports_are_cut():
    saved = {f"params/{i}": (1,) for i in range(9)}
    assert mismatch_report(saved, {}).endswith("and 5 more")
    assert mismatch_report(saved, saved) == ""


def test_an_empty_folder_starts_at_zero(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.check_fits(setup_with().abstract) == 0 and checkpointer.steps() == []


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep_last must be at least 1"):
        Checkpointer(tmp_path, keep_last=0)


def test_paths_become_absolute_and_buckets_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("runs/mine")) == str(tmp_path / "runs" / "mine")
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"


def test_the_first_save_compiles_nothing(tmp_path):
    """Where parameters lie on several devices as a whole, Orbax would for every shape."""
    state = helpers.fresh(helpers.setup_on(helpers.tiny_config(embed_dim=24), {"replica": 2}, 2))
    compiled = []
    watch = CompileWatch(lambda seconds, name: compiled.append(name))
    with Checkpointer(tmp_path) as checkpointer, watch:
        checkpointer.save(1, state, {"position": 16})
        checkpointer.finish(1)
        assert compiled == [] and watch.so_far().programs == 0
        assert checkpointer.steps() == [1]
