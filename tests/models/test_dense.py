"""Products and norms of our own against those of Flax: the same parameters, numbers, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.models.dense import Dense, add_bias, norm
from vlp_jax.models.heads import FromHeads, ToHeads
from vlp_jax.models.values import PLAIN, TransformerConfig

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 16)), jnp.float32)
HEADS = X.reshape(3, 5, 2, 8)
XAVIER = {"kernel_init": nn.initializers.xavier_uniform()}
NAMES = (("a", "b"), ("c",), PLAIN)
CONFIG = TransformerConfig(16, 1, 16, 1, norm_eps=1e-5)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return norm(CONFIG, jnp.float32, "norm")(x)


class FlaxNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x)


PAIRS = {
    "dense": (Dense(*NAMES, features=7), nn.Dense(7, **XAVIER), X),
    "to heads": (
        ToHeads(("a", "b", "c"), ("b", "c"), PLAIN, heads=2, head_dim=8),
        nn.DenseGeneral((2, 8), **XAVIER),
        X,
    ),
    "from heads": (
        FromHeads(("a", "b", "c"), ("c",), PLAIN, heads=2, width=6),
        nn.DenseGeneral(6, axis=(-2, -1), **XAVIER),
        HEADS,
    ),
    "norm": (Normed(), FlaxNormed(), X),
}


@pytest.mark.parametrize("case", PAIRS)
def test_flax_has_the_same(case):
    ours, theirs, x = PAIRS[case]
    params = nn.unbox(ours.init(jax.random.key(0), x))
    expected = theirs.init(jax.random.key(0), x)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    # Other values than zeros and ones.
    params = jax.tree.map(lambda p: p + 0.1 * jnp.arange(p.size).reshape(p.shape) / p.size, params)
    weight = np.random.default_rng(1).normal(size=theirs.apply(params, x).shape)

    def gradients(module):
        return jax.value_and_grad(lambda p, x: (module.apply(p, x) * weight).sum(), (0, 1))

    ours, theirs = gradients(ours)(params, x), gradients(theirs)(params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_heads_side_by_side_are_the_same_numbers():
    plain, flat = (
        ToHeads(("a", "b", "c"), ("b", "c"), PLAIN, heads=2, head_dim=8, flat=flat)
        for flat in (False, True)
    )
    params = plain.init(jax.random.key(0), X)
    np.testing.assert_allclose(
        flat.apply(params, X), plain.apply(params, X).reshape(X.shape), rtol=1e-6, atol=1e-6
    )


def test_a_bias_in_bfloat16_gets_a_sum_in_float32():
    """4,096 gradients of 1: bfloat16 stops counting at 256."""
    x = jnp.zeros((64, 64, 2), jnp.bfloat16)
    bias = jnp.zeros(2, jnp.bfloat16)
    gradient = jax.grad(lambda b: add_bias(x, b).astype(jnp.float32).sum())(bias)
    assert gradient.dtype == jnp.bfloat16 and (gradient == 4096).all()


def test_norms_of_bfloat16_have_float32_statistics():
    x = jnp.asarray(X + 100, jnp.bfloat16)
    module = Normed()
    params = nn.unbox(module.init(jax.random.key(0), x))
    exact = np.float64(x)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(module.apply(params, x), exact, atol=1e-4)
