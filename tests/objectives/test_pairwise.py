"""The pairwise losses against Optax, a float64 NumPy oracle and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.objectives.contrastive import bound_above
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES, pair_logits, sigmoid_loss, softmax_loss


def unit_vectors(rng, n, d):
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(params=[(4, 3), (33, 16)], ids=str)
def pairs(request):
    n, d = request.param
    rng = np.random.default_rng(n)
    return unit_vectors(rng, n, d), unit_vectors(rng, n, d), 14.3, -2.5


def oracle(name, image, text, scale, bias):
    """The definitions of the papers, term by term, in float64."""
    logits = scale * image @ text.T + bias
    n = len(logits)
    if name == "softmax":
        rows = [np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(n)]
        columns = [np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(n)]
        return (np.mean(rows) + np.mean(columns)) / 2
    total = 0.0
    for i in range(n):
        for j in range(n):
            total += np.log1p(np.exp(-(1 if i == j else -1) * logits[i, j]))
    return total / n


def value(name, image, text, scale, bias):
    return PAIRWISE_LOSSES[name](pair_logits(image, text, scale, bias))


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_equals_float64_oracle(name, pairs):
    ours = value(name, *(jnp.asarray(x, jnp.float32) for x in pairs))
    np.testing.assert_allclose(ours, oracle(name, *pairs), rtol=1e-5)


def test_softmax_equals_optax(pairs):
    image, text, scale, bias = (jnp.asarray(x, jnp.float32) for x in pairs)
    logits = pair_logits(image, text, scale, bias)
    labels = jnp.arange(len(logits))
    ce = optax.softmax_cross_entropy_with_integer_labels
    expected = (ce(logits, labels).mean() + ce(logits.T, labels).mean()) / 2
    np.testing.assert_allclose(softmax_loss(logits), expected, rtol=1e-5)


def test_softmax_is_symmetric_in_images_and_texts(pairs):
    image, text, scale, bias = (jnp.asarray(x, jnp.float32) for x in pairs)
    forward = value("softmax", image, text, scale, bias)
    np.testing.assert_allclose(value("softmax", text, image, scale, bias), forward, rtol=1e-6)


def test_sigmoid_equals_optax(pairs):
    image, text, scale, bias = (jnp.asarray(x, jnp.float32) for x in pairs)
    logits = pair_logits(image, text, scale, bias)
    labels = jnp.eye(len(logits))
    expected = optax.sigmoid_binary_cross_entropy(logits, labels).sum() / len(logits)
    np.testing.assert_allclose(sigmoid_loss(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_gradients_match_finite_differences_in_float64(name, pairs):
    with jax.enable_x64(True):
        arguments = [jnp.asarray(x, jnp.float64) for x in pairs]
        gradients = jax.grad(lambda *a: value(name, *a), argnums=(0, 1, 2, 3))(*arguments)
        rng = np.random.default_rng(0)
        for index, gradient in enumerate(gradients):
            assert gradient.dtype == jnp.float64
            direction = rng.normal(size=np.shape(gradient))

            def shifted(by, index=index, direction=direction):
                moved = list(arguments)
                moved[index] = moved[index] + by * direction
                return value(name, *moved)

            numeric = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
            np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_permuting_the_pairs_changes_nothing(name, pairs):
    image, text, scale, bias = (jnp.asarray(x, jnp.float32) for x in pairs)
    order = np.random.default_rng(1).permutation(len(image))
    np.testing.assert_allclose(
        value(name, image[order], text[order], scale, bias),
        value(name, image, text, scale, bias),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_bfloat16_logits_are_reduced_in_float32(name):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)) * 10, jnp.bfloat16)
    loss = PAIRWISE_LOSSES[name](logits)
    assert loss.dtype == jnp.float32
    expected = PAIRWISE_LOSSES[name](logits.astype(jnp.float32))
    np.testing.assert_array_equal(loss, expected)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_large_logits_stay_finite(name):
    logits = jnp.asarray([[1e4, -1e4], [1e4, -1e4]], jnp.float32)
    gradient = jax.grad(PAIRWISE_LOSSES[name])(logits)
    assert np.isfinite(PAIRWISE_LOSSES[name](logits)) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", PAIRWISE_LOSSES)
def test_devices_never_meet_under_a_condition(name):
    """The logits are sharded. On CPU, devices once waited for ever in a collective of a branch."""
    program = jax.make_jaxpr(jax.value_and_grad(PAIRWISE_LOSSES[name]))(jnp.ones((16, 16)))
    assert "cond[" not in str(program)


def test_bound_above_lets_gradients_lead_back_only():
    pull_down = jax.grad(lambda x: 3 * bound_above(x, 1.0))
    push_up = jax.grad(lambda x: -3 * bound_above(x, 1.0))
    assert bound_above(jnp.float32(2.0), 1.0) == 1.0
    assert pull_down(2.0) == 3 and push_up(2.0) == 0
    assert pull_down(0.5) == 3 and push_up(0.5) == -3
