"""Every way to compute attention against float64 NumPy, and what each does not hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from vlp_jax.models.attention import ATTENTIONS, attend
from vlp_jax.models.attention_kernel import short_attention
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules

# (batch, queries, keys, heads, head_dim, causal, lengths)
CASES = {
    "image": (2, 21, 21, 2, 64, False, None),
    "whole tiles": (1, 128, 128, 1, 128, False, None),
    "causal": (2, 13, 13, 2, 64, True, None),
    "padded": (3, 9, 24, 4, 32, False, (3, 24, 1)),
    "causal and padded": (2, 9, 9, 8, 16, True, (4, 9)),
    "one query": (2, 1, 17, 2, 64, False, None),
    "wide heads": (1, 5, 7, 1, 256, False, None),
}
ON_CPU = [name for name in ATTENTIONS if name not in ("cudnn", "pallas")]


def inputs(case, dtype=np.float64):
    batch, queries, keys, heads, head_dim, causal, lengths = CASES[case]
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys, queries)]
    arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    return arrays, causal, None if lengths is None else np.asarray(lengths)


def oracle(q, k, v, causal, lengths):
    """Loops over examples and heads, float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
            for i in range(q.shape[1]):
                seen = k.shape[1] if lengths is None else lengths[b]
                seen = min(seen, i + 1) if causal else seen
                weights = np.exp(scores[i, :seen] - scores[i, :seen].max())
                out[b, i, h] = weights @ v[b, :seen, h] / weights.sum()
    return out


def of_name(name):
    if name == "kernel":

        def kernel(q, k, v, causal, lengths):
            flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
            fields = {"head_dim": q.shape[-1], "causal": causal, "interpret": True}
            return short_attention(*flat, lengths, **fields).reshape(q.shape)

        return kernel
    return lambda q, k, v, causal, lengths: attend(
        q, k, v, implementation=name, causal=causal, lengths=lengths
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_values(name, case):
    (q, k, v, _), causal, lengths = inputs(case)
    expected = oracle(q, k, v, causal, lengths)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    values = jax.jit(lambda *a: of_name(name)(*a, causal, lengths))(*arrays)
    np.testing.assert_allclose(values, expected, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_gradients_against_a_finite_difference(name, case):
    (q, k, v, weight), causal, lengths = inputs(case)
    direction = [np.random.default_rng(1).normal(size=x.shape) for x in (q, k, v)]

    def value(step):
        moved = [x + step * d for x, d in zip((q, k, v), direction, strict=True)]
        return (oracle(*moved, causal, lengths) * weight).sum()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def loss(q, k, v):
        return (of_name(name)(q, k, v, causal, lengths) * weight.astype(np.float32)).sum()

    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    found = sum((np.float64(g) * d).sum() for g, d in zip(grads, direction, strict=True))
    np.testing.assert_allclose(found, slope, rtol=2e-4, atol=1e-4)
    if lengths is not None:  # what is not seen has no gradient at all
        unseen = np.arange(k.shape[1]) >= np.asarray(lengths)[:, None]
        assert not np.asarray(grads[1])[unseen].any() and not np.asarray(grads[2])[unseen].any()


@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_bfloat16_is_near(name):
    (q, k, v, _), causal, lengths = inputs("image")
    expected = oracle(q, k, v, causal, lengths)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = jax.jit(lambda *a: of_name(name)(*a, causal, lengths))(*arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), expected, atol=0.05)


@pytest.mark.parametrize("sizes", [{"replica": 4, "tensor": 2}, {"fsdp": 8}, {"replica": 8}])
def test_the_kernel_runs_on_each_device_with_its_part(sizes):
    """Eight examples of four heads, over examples and, where there is the axis, heads."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(8, 6, 4, 64)).astype(np.float32) for _ in range(3))
    lengths = np.array([6, 1, 2, 3, 4, 5, 6, 6], np.int32)
    mesh = mesh_lib.make_mesh(sizes)

    def run(q, k, v, lengths):
        return attend(q, k, v, implementation="pallas", lengths=lengths)

    spread = NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))
    with rules.use_mesh(mesh), pltpu.force_tpu_interpret_mode():
        arrays = jax.device_put((q, k, v, lengths), spread)
        lowered = jax.jit(run).lower(*arrays)
        out = lowered.compile()(*arrays)
    np.testing.assert_allclose(out, oracle(q, k, v, False, lengths), atol=3e-6)
    assert "all-gather" not in lowered.compile().as_text()


def test_the_kernel_is_lowered_for_a_tpu():
    """What Mosaic gets holds no loop over examples, and scores are nowhere in its arguments."""
    shape = jax.ShapeDtypeStruct((4, 196, 12, 64), jnp.bfloat16)

    def loss(q, k, v):
        return attend(q, k, v, implementation="pallas").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2
    assert "196x196" not in text


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 16, 72), "heads that fill columns of 128"),
        ((1, 16, 3, 64), "heads that fill columns of 128"),
        ((1, 4096, 12, 64), "fast memory"),
    ],
)
def test_shapes_that_the_kernel_does_not_hold(shape, words):
    x = jnp.zeros(shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=words):
        attend(x, x, x, implementation="pallas")


def test_cudnn_says_what_to_take_where_it_refuses():
    x = jnp.zeros((2, 4, 2, 8))  # float32, and here is no cuDNN
    with pytest.raises(ValueError, match="'cudnn' refuses: .*; take attention 'xla'"):
        jax.eval_shape(functools.partial(attend, implementation="cudnn"), x, x, x)


def test_an_unknown_name_is_refused():
    x = jnp.zeros((1, 4, 1, 128))
    with pytest.raises(ValueError, match="unknown attention 'flash'.*pallas"):
        attend(x, x, x, implementation="flash")
