"""FLOPs of a jaxpr against XLA's own count, and against 6ND + attention."""

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.models.layers import Encoder
from vlp_jax.models.values import ComputeConfig, TransformerConfig
from vlp_jax.objectives.flops import count_flops
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training.abstract_setup import abstract_setup

DEPTH, WIDTH, MLP, HEADS, TOKENS, BATCH = 3, 128, 512, 4, 48, 4


def training_step(scan_layers, remat="none"):
    """The gradient of an encoder behind a projection, and its arguments."""
    encoder = Encoder(
        TransformerConfig(WIDTH, DEPTH, MLP, HEADS),
        ComputeConfig(scan_layers=scan_layers, remat=remat),
    )
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.float32)
    key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    params = nn.unbox(jax.eval_shape(encoder.init, key, x))
    first = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)

    def loss(params, first, x):
        return jnp.square(encoder.apply(params, x @ first)).mean()

    return jax.grad(loss, argnums=(0, 1)), (params, first, x)


def matrix_flops():
    """6ND of the kernels of the blocks, and three times both products of attention."""
    parameters = DEPTH * (4 * WIDTH * WIDTH + 2 * WIDTH * MLP)
    tokens = BATCH * TOKENS
    projection = 4 * WIDTH * WIDTH * tokens  # its input has no gradient
    return 6 * parameters * tokens + 12 * DEPTH * TOKENS * WIDTH * tokens + projection


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_step_is_6nd_and_attention(scan_layers):
    function, arguments = training_step(scan_layers)
    assert count_flops(function, *arguments).total == pytest.approx(matrix_flops(), rel=0.01)


def test_xla_counts_the_same_where_layers_stand_one_by_one():
    function, arguments = training_step(scan_layers=False)
    compiled = jax.jit(function).lower(*arguments).compile()
    # XLA counts what is not a product too.
    ours, theirs = count_flops(function, *arguments).total, compiled.cost_analysis()["flops"]
    assert 0.95 < ours / theirs <= 1


def test_full_rematerialization_repeats_all_but_the_last_product_of_a_layer():
    function, arguments = training_step(scan_layers=True, remat="full")
    tokens = BATCH * TOKENS
    again = DEPTH * tokens * (8 * WIDTH**2 + 2 * WIDTH * MLP + 4 * TOKENS * WIDTH)
    expected = matrix_flops() + again
    assert count_flops(function, *arguments).total == pytest.approx(expected, rel=0.01)


def test_shapes_inside_shard_map_are_those_of_a_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    spec = PartitionSpec("a")

    def times_own(x):
        return x @ x.T

    both = jax.shard_map(times_own, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    # 2 x 16 times 16 x 2 on each of 8 devices: those along "b" do the same work.
    assert count_flops(both, x).total == 8 * 2 * 2 * 2 * 16
    one = jax.shard_map(
        times_own, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"a"}, check_vma=False
    )
    with jax.set_mesh(mesh):
        assert count_flops(jax.jit(one), x).total == 4 * 2 * 2 * 2 * 16


def test_a_scan_counts_its_rounds_and_a_conditional_its_most_expensive_branch():
    x = jnp.ones((8, 8))

    def rounds(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]

    def choice(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(rounds, x).total == 5 * 2 * 8**3
    assert count_flops(choice, x).total == 2 * 2 * 8**3
    assert not count_flops(rounds, x).uncounted


def test_a_loop_without_a_known_count_is_told_of():
    found = count_flops(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), jnp.ones((4, 4))
    )
    assert found.total == 2 * 4**3 and "while loop" in found.uncounted[0]


def test_a_convolution_counts_every_place_of_its_kernel():
    patches = nn.Conv(32, (4, 4), strides=(4, 4), use_bias=False)
    image = jnp.ones((2, 16, 16, 3))
    params = patches.init(jax.random.key(0), image)
    forward = 2 * 2 * 16 * (4 * 4 * 3) * 32
    assert count_flops(patches.apply, params, image).total == forward

    def loss(params, image):
        return jnp.square(patches.apply(params, image)).sum()

    step = count_flops(jax.grad(loss, argnums=(0, 1)), params, image).total
    assert step == pytest.approx(3 * forward, rel=0.01)


def test_float32_products_of_highest_precision_count_six_passes():
    x = jnp.ones((4, 4))
    found = count_flops(lambda x: jnp.matmul(x, x, precision="highest"), x)
    assert (found.total, found.passes) == (2 * 4**3, 6 * 2 * 4**3)
    half = count_flops(lambda x: jnp.matmul(x, x, precision="highest"), x.astype(jnp.bfloat16))
    assert half.passes == half.total


BATCH_OF_16 = 16  # of a smoke config


def logits(objective):
    """A row of them."""
    return 2 * BATCH_OF_16 * objective.model.embed_dim


CLOSED = {
    "clip_shapes": lambda o: closed_forms.dual_encoder(o.model) + logits(o),
    "siglip_shapes": lambda o: closed_forms.dual_encoder(o.model) + logits(o),
    "flip_l16": lambda o: closed_forms.dual_encoder(o.model, 2) + logits(o),
    "mae_b16": lambda o: closed_forms.masked_autoencoder(o.model, o.kept),
    "classify_shapes": lambda o: closed_forms.classifier(o.model),
    "vqa_shapes": lambda o: closed_forms.question_answerer(o.model),
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_loss_of_an_objective_has_the_flops_of_the_formulas(name):
    config = smoke_lib.smoke(config_lib.load(f"configs/{name}.py"))
    setup = abstract_setup(config, mesh_lib.make_mesh({"replica": 1}, jax.devices()[:1]), 100)
    expected = CLOSED[name](setup.objective) * BATCH_OF_16
    assert setup.forward_flops == pytest.approx(expected, rel=1e-6)
