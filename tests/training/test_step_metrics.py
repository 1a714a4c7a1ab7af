"""The metrics of a compiled step come in one array, and are those of the plain step."""

import helpers
import jax
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch


def test_they_are_those_of_the_step_and_leave_in_one_array():
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 8})
    batch = put_batch(next(helpers.batches(1)), setup.mesh)
    _, expected = jax.jit(setup.step)(helpers.fresh(setup), batch)
    before = helpers.fresh(setup)
    state, metrics = helpers.compiled(setup)(before, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))  # its memory is reused
    (array,) = jax.tree.leaves(metrics)
    assert array.shape == (len(expected), 2) and array.is_fully_replicated
    assert dict(metrics.fetch()).keys() == dict(metrics).keys() == expected.keys()
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics.fetch()[name], pair, rtol=1e-4, atol=1e-6)
    assert state.step == 1
    assert metrics.get("no such metric") is None and "loss" in metrics


@pytest.mark.parametrize(("name", "chip"), [("pallas", "TPU"), ("cudnn", "GPU")])
def test_attention_for_other_devices_is_refused_before_anything_is_made(name, chip):
    config = helpers.tiny_config(attention=name)
    with pytest.raises(UserError, match=f"attention {name} runs on {chip} alone.*attention=xla"):
        helpers.setup_on(config, {"replica": 8})
