"""The numbers of a run do not depend on how many devices it is spread over, nor how."""

import itertools

import helpers
import jax
import numpy as np
import pytest

from vlp_jax.commands import show_sharding
from vlp_jax.parallel import rules
from vlp_jax.parallel.batch import put_batch
from vlp_jax.train import describe_run

MESHES = {
    "2": ({"replica": 2}, 2),
    "4": ({"replica": 4}, 4),
    "8x1": ({"replica": 8, "fsdp": 1}, 8),
    "4x2": ({"replica": 4, "fsdp": 2}, 8),
    "2x4": ({"replica": 2, "fsdp": 4}, 8),
    "2x2x2": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
}


def first_gradients(setup):
    batch = put_batch(next(helpers.batches(1)), setup.mesh)
    with rules.use_mesh(setup.mesh):
        return jax.device_get(helpers.gradients(setup, helpers.fresh(setup).params, batch))


def losses(setup):
    return [metrics["loss"] for metrics in helpers.train(setup, 20)[1]]


@pytest.fixture(scope="module")
def reference(request):
    config = helpers.tiny_config(loss=request.param)
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    return config, first_gradients(setup), losses(setup)


# test_processes.py trains with the sigmoid loss on another mesh.
@pytest.mark.parametrize(
    "reference, name",
    [
        pytest.param(*pair, marks=() if pair == ("softmax", "2x2x2") else pytest.mark.slow)
        for pair in itertools.product(("softmax", "sigmoid"), MESHES)
    ],
    indirect=["reference"],
)
def test_first_gradients_and_losses_equal_those_of_one_device(reference, name):
    config, gradients, expected = reference
    setup = helpers.setup_on(config, *MESHES[name])
    total = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    for (path, ours), one in zip(
        jax.tree_util.tree_leaves_with_path(first_gradients(setup)),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        # The bias of the keys shifts all scores of a query alike: its true gradient is zero.
        zero = "'key'" in str(path) and "'bias'" in str(path)
        floor = 1e-6 * total if zero else 0
        error = np.linalg.norm(ours - one)
        assert error <= 1e-5 * np.linalg.norm(one) + floor, (path, error, np.linalg.norm(one))
    np.testing.assert_allclose(losses(setup), expected, rtol=1e-4)
    assert abs(expected[-1] - expected[0]) > 1e-2  # something was learned, so the check says much


def test_fsdp_shards_parameters_and_optimizer_state():
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 4})
    whole = local = 0
    for leaf in jax.tree.leaves(helpers.fresh(setup)):
        whole += leaf.nbytes
        local += leaf.addressable_shards[0].data.nbytes
    assert local < 1.01 * whole / 4


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole():
    config = helpers.tiny_config(embed_dim=10)
    config.objective.image.heads = config.objective.text.heads = 1
    setup = helpers.setup_on(config, {"replica": 4, "tensor": 2})
    query = setup.abstract.params["image"]["encoder"]["layers"]["attention"]["query"]["kernel"]
    up = setup.abstract.params["image"]["encoder"]["layers"]["mlp"]["up"]["kernel"]
    assert "tensor" not in query.sharding.spec
    assert up.sharding.spec[2] == "tensor"


def test_sharding_table_names_every_parameter_and_adds_up():
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 4})
    boxed = jax.eval_shape(lambda: setup.objective.init(jax.random.key(0), setup.batch_spec))
    rows = show_sharding.rows_of(setup.abstract.params, boxed)
    assert len(rows) == len(jax.tree.leaves(setup.abstract.params))
    (row,) = [row for row in rows if row.path == "text/token_embedding/embedding"]
    assert (row.shape, row.names) == ((64, 32), ("vocab", "embed"))
    assert (row.spec, row.bytes_per_device) == (((), ("fsdp",)), 64 * 32 * 4 // 4)
    (line,) = [x for x in show_sharding.table(rows).splitlines() if x.startswith(row.path)]
    assert line.split()[1:] == ["vocab=64", "embed=32/fsdp", "2,048"]
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(setup.abstract.params))
    assert rules.spread(setup.abstract.params, setup.mesh).total == whole


def test_the_log_says_what_a_device_holds():
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 4})
    local = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(helpers.fresh(setup))
    )
    line = describe_run(setup, 0)
    assert f"; {local / 2**20:.1f} MiB of state a device, 1.00 of an even part" in line
