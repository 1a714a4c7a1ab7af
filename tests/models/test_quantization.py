"""Products in 8 bits, against NumPy on numbers rounded by ml_dtypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlp_jax.models import layers
from vlp_jax.models.dense import BACKWARD, FORWARD, multiply, quantize
from vlp_jax.models.values import ComputeConfig, TransformerConfig


def rounded(x, dtype):
    """`x` to 8 bits and back, as the definition says."""
    x = np.asarray(x)
    factor = np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)
    return (x / factor).astype(dtype).astype(np.float64) * factor


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_product_is_that_of_rounded_factors():
    x, w = normal(0, 6, 32), normal(1, 32, 5) * 100
    expected = rounded(x, ml_dtypes.float8_e4m3fn) @ rounded(w, ml_dtypes.float8_e4m3fn)
    np.testing.assert_allclose(multiply(x, w, "fp8"), expected, rtol=1e-5, atol=1e-3)
    assert np.abs(expected - x @ w).max() > 1e-2  # rounding is seen


def test_gradients_are_products_with_a_rounded_gradient():
    x, w, g = normal(0, 6, 32), normal(1, 32, 5), normal(2, 6, 5)
    _, pull = jax.vjp(lambda x, w: multiply(x, w, "fp8"), x, w)
    to_x, to_w = pull(g)
    a, b = (rounded(t, ml_dtypes.float8_e4m3fn) for t in (x, w))
    c = rounded(g, ml_dtypes.float8_e5m2)
    np.testing.assert_allclose(to_x, c @ b.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(to_w, a.T @ c, rtol=1e-5, atol=1e-4)


def test_several_dimensions_around_the_product():
    x, w = normal(0, 2, 3, 32), normal(1, 32, 4, 5)
    flat = multiply(x.reshape(6, 32), w.reshape(32, 20), "fp8")
    np.testing.assert_array_equal(multiply(x, w, "fp8"), flat.reshape(2, 3, 4, 5))


def test_zeros_and_numbers_that_are_none():
    value, factor = quantize(jnp.zeros(4), jnp.float8_e4m3fn)
    assert factor == 1 and not np.asarray(value, np.float32).any()
    value, factor = quantize(jnp.array([1.0, jnp.nan]), jnp.float8_e4m3fn)
    assert np.isnan(np.float32(value)[1] * factor)  # the guard of a step sees it


def test_the_least_numbers_give_no_nan():
    """Gradients of a loss that is nearly zero are below what a factor can be divided by."""
    for dtype in (FORWARD, BACKWARD):
        for size in (1e-30, 1e-34, 1e-36, 1e-38):
            quantized, factor = jax.jit(quantize, static_argnums=1)(jnp.full(4, size), dtype)
            assert factor > 0 and np.isfinite(np.asarray(quantized, np.float32)).all()
    a, b = jnp.ones((4, 8)), jnp.ones((8, 2))
    _, pull = jax.vjp(lambda a, b: multiply(a, b, "fp8"), a, b)
    for gradient in jax.jit(pull)(jnp.full((4, 2), 1e-35)):
        np.testing.assert_allclose(gradient, 0, atol=1e-33)


def test_an_encoder_has_the_same_parameters_and_is_near():
    x = jnp.asarray(normal(0, 2, 9, 64))
    config = TransformerConfig(64, depth=2, mlp_dim=128, heads=2)
    plain, small = (layers.Encoder(config, ComputeConfig(quantization=q)) for q in ("none", "fp8"))
    params = plain.init(jax.random.key(0), x)
    shapes = jax.eval_shape(small.init, jax.random.key(0), x)
    assert jax.tree.structure(nn.unbox(shapes)) == jax.tree.structure(nn.unbox(params))
    expected, out = plain.apply(params, x), small.apply(params, x)
    error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
    assert 1e-3 < error < 0.1
    text = str(jax.make_jaxpr(lambda p: small.apply(p, x))(params))
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(products) == 8  # q, k, v, out, up, down; scores and values are as they were
    assert sum("f8_e4m3fn" in line for line in text.splitlines()) >= 12


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown quantization 'int4'.*fp8"):
        multiply(jnp.ones((1, 2)), jnp.ones((2, 1)), "int4")
