"""What the backward pass keeps: the same gradients, and the products that are done again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import init

from vlp_jax.models import layers
from vlp_jax.models.layers import NAMES, REMAT_POLICIES
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder
from vlp_jax.models.masking import random_mask
from vlp_jax.models.values import ComputeConfig, TransformerConfig
from vlp_jax.models.vit import make_vit

# Products of a layer: six with kernels and two of attention, and twice as many backward. What is
# done again on top of that: all but the last, which is no factor of a gradient; the two of
# attention; the scores and the projection behind attention; these and the feed-forward layer's
# first.
PRODUCTS = {"none": 24, "full": 31, "dots": 26, "names": 26, "names_lean": 27, "offload": 26}
BIASES = 6  # each of whose gradients is a product with ones


def gradient(remat, scan_layers=True, dtype=jnp.float32):
    config = TransformerConfig(16, 2, 32, 2)
    compute = ComputeConfig(dtype, remat=remat, scan_layers=scan_layers)
    encoder = layers.Encoder(config, compute)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = init(layers.Encoder(config, ComputeConfig(scan_layers=scan_layers)), x)
    return (lambda p: jnp.square(encoder.apply(p, x)).sum()), params


KEY = jax.random.key(1)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_gradients_are_those_without(remat):
    loss, params = gradient(remat)
    plain, _ = gradient("none")
    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(loss))(params)),
        jax.tree.leaves(jax.jit(jax.grad(plain))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", *REMAT_POLICIES])
def test_products_that_are_done_again(remat):
    for dtype, biases in ((jnp.float32, 0), (jnp.bfloat16, BIASES)):
        loss, params = gradient(remat, dtype=dtype)
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert text.count("dot_general[") == PRODUCTS[remat] + biases


def test_offloaded_activations_go_to_the_host_and_back():
    loss, params = gradient("offload")
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "pinned_host" in text or "Host" in text
    assert all(name in text for name in NAMES)


def test_a_masked_encoder_holds_nothing_of_hidden_patches_but_stored_pixels():
    vit = make_vit("mu/8", 64, pooling="none", class_token=True, position="sincos")
    decoder = MaskedDecoder(vit.grid, True, 192, TransformerConfig(16, 1, 32, 2), parent=None)
    model = MaskedAutoencoder(vit, decoder)
    batch, kept = 2, 4
    image = jnp.zeros((batch, 64, 64, 3), jnp.uint8)
    mask = random_mask(KEY, batch, vit.patches, kept)
    params = init(model, image, mask)
    jaxpr = jax.make_jaxpr(lambda p, x, k: model.apply(p, x, k, method="encode"))(
        params, image, mask.keep
    )
    full = batch * vit.patches * 192
    assert not any(is_float(v) and v.aval.size >= full for v in variables(jaxpr.jaxpr))


def is_float(variable):
    return hasattr(variable.aval, "dtype") and jnp.issubdtype(variable.aval.dtype, jnp.floating)


def variables(jaxpr):
    """Yields every value of a program and of its inner programs, parameters left out."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for parameter in jax.tree.leaves(equation.params):  # programs are leaves, closed or open
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from variables(inner)
