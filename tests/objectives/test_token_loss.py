"""Cross-entropy in chunks: against Optax and NumPy, and what it holds at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.objectives.captioning import token_losses

BATCH, TOKENS, WIDTH, VOCAB = 3, 7, 8, 21


def arrays():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, (BATCH, TOKENS)).astype(np.int32)
    return jnp.asarray(features), jnp.asarray(kernel), jnp.asarray(labels)


def loss_of(chunk_bytes, **fields):
    def loss(features, kernel, labels):
        score = lambda x: x @ kernel  # noqa: E731
        return token_losses(score, features, labels, VOCAB, chunk_bytes=chunk_bytes, **fields)

    return loss


@pytest.mark.parametrize("places", [1, 2, 3, 7])
@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
def test_values_and_gradients_are_those_of_optax(places, fields):
    features, kernel, labels = arrays()
    loss = loss_of(4 * BATCH * VOCAB * places, **fields)

    def expected(features, kernel):
        scores = features @ kernel
        shares = optax.smooth_labels(
            jax.nn.one_hot(labels, VOCAB), fields.get("label_smoothing", 0.0)
        )
        own = optax.softmax_cross_entropy(scores, shares)
        return own + fields.get("z_loss", 0) * jax.nn.logsumexp(scores, axis=-1) ** 2

    found = jax.jit(loss)(features, kernel, labels)
    np.testing.assert_allclose(found.loss, expected(features, kernel), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.hit, jnp.argmax(features @ kernel, axis=-1) == labels)
    weight = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    ours, theirs = (
        jax.jit(jax.grad(lambda f, k, g=g: (g(f, k) * weight).sum(), (0, 1)))(features, kernel)
        for g in (lambda f, k: loss(f, k, labels).loss, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_large_vocabulary_takes_less_than_a_gibibyte():
    """256 texts of 64 tokens out of 256,000: all scores at once would be 16 GiB."""
    batch, tokens, width, vocab = 256, 64, 64, 256_000
    score_bytes = 4 * batch * tokens * vocab
    shapes = (
        jax.ShapeDtypeStruct((batch, tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
    )

    def loss(features, kernel, labels):
        return token_losses(lambda x: x @ kernel, features, labels, vocab).loss.mean()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporaries: {temporaries / 2**30:.2f} GiB, all scores {score_bytes / 2**30:.1f} GiB")
    assert temporaries < 2**30 < score_bytes / 10
