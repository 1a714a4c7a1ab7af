"""The rules that shard a state: by names, and what is left over fsdp, so that parts are even."""

import fake_devices
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from recipe_shapes import load

from vlp_jax.parallel import rules
from vlp_jax.training.abstract_setup import abstract_setup


def spec(names, shape, mesh):
    return rules.leaf_sharding(names, shape, fake_devices.mesh(*mesh)).spec


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (12, 64, 256), PartitionSpec(None, "fsdp", None)),
        (("layers", "norm"), (12, 64), PartitionSpec(None, "fsdp")),
        (("layers", "heads", "head_dim"), (12, 12, 64), PartitionSpec(None, None, "fsdp")),
        (("layers", "heads", "head_dim"), (16, 32, 24), PartitionSpec(None, "fsdp", None)),
        (("norm",), (64,), PartitionSpec("fsdp")),
        (("layers", "norm"), (16, 10), PartitionSpec(None, None)),  # never the layers
        ((None, "embed"), (16, 24), PartitionSpec("fsdp", None)),  # the name's own does not divide
        ((None, None), (16, 16), PartitionSpec("fsdp", None)),  # of equal ones the first
        ((None, None, None), (16, 48, 32), PartitionSpec(None, "fsdp", None)),
        ((), (), PartitionSpec()),
        (("norm",), (10,), PartitionSpec(None)),
    ],
)
def test_fsdp_takes_a_dimension_of_everything_that_it_divides(names, shape, expected):
    assert spec(names, shape, (2, 16, 1)) == expected


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("layers", "embed", "mlp"), (12, 64, 256), PartitionSpec(None, "fsdp", "tensor")),
        (("layers", "heads", "head_dim"), (12, 12, 64), PartitionSpec(None, "tensor", "fsdp")),
        # No dimension is free: fsdp joins tensor, or what tensor does not divide is free for it.
        (("layers", "mlp"), (12, 256), PartitionSpec(None, ("tensor", "fsdp"))),
        (("layers", "mlp"), (12, 36), PartitionSpec(None, "tensor")),
        (("layers", "heads", "head_dim"), (12, 6, 64), PartitionSpec(None, None, "fsdp")),
        (("vocab", "embed"), (36, 64), PartitionSpec("tensor", "fsdp")),
    ],
)
def test_fsdp_beside_tensor(names, shape, expected):
    assert spec(names, shape, (1, 16, 4)) == expected


def test_axes_of_one_device_are_not_named():
    assert spec(("layers", "embed", "mlp"), (12, 64, 256), (8, 1, 1)) == PartitionSpec(*[None] * 3)


# What tools.show_sharding says of the state, adafactor's or AdamW's with it, is within 5 % of even.
EVEN = [
    ("siglip_b16", 64, 1),
    ("clip_l14", 64, 1),
    ("mae_h14", 64, 1),
    ("siglip_so400m14", 32, 2),
    ("siglip_g", 64, 1),
]
EVEN_SLOW = [
    *((name, 16, 1) for name, *_ in EVEN),
    ("siglip_b16", 64, 4),
    ("clip_l14", 64, 4),
    ("clip_l14", 128, 2),
    ("mae_h14", 64, 4),
    ("mae_h14", 128, 2),
    ("siglip_g", 64, 4),
]


@pytest.mark.parametrize(
    ("name", "fsdp", "tensor"),
    [*EVEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in EVEN_SLOW)],
)
def test_the_state_of_large_recipes_is_spread_evenly(name, fsdp, tensor):
    mesh = fake_devices.mesh(1, fsdp, tensor)
    setup = abstract_setup(load(name), mesh, epoch_examples=1_281_167)
    assert rules.spread(setup.abstract, mesh).ratio < 1.05
    parts = fsdp * tensor
    leaves = jax.tree.leaves(setup.abstract)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    local = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
    assert total / parts <= local < 1.05 * total / parts
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.abstract.params):
        stacked = "'layers'" in jax.tree_util.keystr(path)
        assert not stacked or leaf.sharding.spec[0] is None  # the layers are never gathered at once
