"""Every way to compute attention against float64 NumPy, and what each does not hold."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from vlp_jax.models.attention import ATTENTIONS, HOLDS, AttentionMask, attend
from vlp_jax.models.attention_kernel import short_attention
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules

# (batch, queries, keys, heads, head_dim, rules of the mask)
CASES = {
    "image": (2, 21, 21, 2, 64, {}),
    "whole tiles": (1, 128, 128, 1, 128, {}),
    "causal": (2, 13, 13, 2, 64, {"causal": True}),
    "padded": (3, 9, 24, 4, 32, {"lengths": (3, 24, 1)}),
    "causal and padded": (2, 9, 9, 8, 16, {"causal": True, "lengths": (4, 9)}),
    "one query": (2, 1, 17, 2, 64, {}),
    "wide heads": (1, 5, 7, 1, 256, {}),
}
ON_CPU = [name for name in ATTENTIONS if name not in ("cudnn", "pallas")]
# All rules that can stand beside each other, of 2 examples with 5 queries and 7 or 5 keys.
RULES = {
    "causal": True,
    "prefix": (3, 0),
    "offset": 2,
    "lengths": (6, 3),
    "segments": ((0, 0, 1, 1, 1), (0, 1, 1, 1, 1)),
    "explicit": np.random.default_rng(7).random((2, 1, 5, 5)) < 0.6,
}


def combinations():
    """Every set of rules that has a meaning."""
    for count in range(1, len(RULES) + 1):
        for names in itertools.combinations(RULES, count):
            if {"prefix", "offset"} & set(names) and "causal" not in names:
                continue
            yield names


def mask_of(rules):
    arrays = {name: jnp.asarray(x) for name, x in rules.items() if name != "causal"}
    return AttentionMask(causal=rules.get("causal", False), **arrays)


def is_seen(rules, b, i, j):
    """Whether query i of example b sees key j."""
    if rules.get("causal"):
        before = j <= i + rules.get("offset", 0)
        if not before and not ("prefix" in rules and j < rules["prefix"][b]):
            return False
    if "lengths" in rules and j >= rules["lengths"][b]:
        return False
    if "segments" in rules and rules["segments"][b][i] != rules["segments"][b][j]:
        return False
    return "explicit" not in rules or bool(rules["explicit"][b, 0, i, j])


def inputs(case, dtype=np.float64):
    batch, queries, keys, heads, head_dim, rules = CASES[case] if isinstance(case, str) else case
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys, queries)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes], rules


def oracle(q, k, v, rules):
    """Loops over examples, heads and queries, float64."""
    out = np.zeros(q.shape)
    for b, h, i in itertools.product(*map(range, (q.shape[0], q.shape[2], q.shape[1]))):
        seen = [j for j in range(k.shape[1]) if is_seen(rules, b, i, j)]
        scores = k[b, seen, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
    return out


def of_name(name):
    if name == "kernel":

        def kernel(q, k, v, mask):
            flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
            fields = {"head_dim": q.shape[-1], "causal": mask.causal, "interpret": True}
            return short_attention(*flat, mask.lengths, **fields).reshape(q.shape)

        return kernel
    return lambda q, k, v, mask: attend(q, k, v, implementation=name, mask=mask)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_values(name, case):
    (q, k, v, _), rules = inputs(case)
    expected = oracle(q, k, v, rules)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    values = jax.jit(of_name(name))(*arrays, mask_of(rules))
    np.testing.assert_allclose(values, expected, atol=3e-6)


def gradients_fit(name, case):
    """The gradient of every input against a finite difference of the oracle."""
    (q, k, v, weight), rules = inputs(case)
    direction = [np.random.default_rng(1).normal(size=x.shape) for x in (q, k, v)]

    def value(step):
        moved = [x + step * d for x, d in zip((q, k, v), direction, strict=True)]
        return (oracle(*moved, rules) * weight).sum()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5

    def loss(q, k, v, mask):
        return (of_name(name)(q, k, v, mask) * weight.astype(np.float32)).sum()

    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays, mask_of(rules))
    found = sum((np.float64(g) * d).sum() for g, d in zip(grads, direction, strict=True))
    np.testing.assert_allclose(found, slope, rtol=2e-4, atol=1e-4)
    for b, j in itertools.product(range(len(q)), range(k.shape[1])):
        if not any(is_seen(rules, b, i, j) for i in range(q.shape[1])):
            # What is not seen has no gradient at all.
            assert not np.asarray(grads[1])[b, j].any() and not np.asarray(grads[2])[b, j].any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_gradients_against_a_finite_difference(name, case):
    gradients_fit(name, case)


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_asked_for_even_lengths_alone(case, monkeypatch):
    """JAX refuses odd ones in training. XLA computes in the place of cuDNN, which is not here."""
    compute = jax.nn.dot_product_attention

    def even(query, key, value, implementation, **told):
        assert implementation == "cudnn" and query.shape[1] % 2 == key.shape[1] % 2 == 0
        return compute(query, key, value, implementation="xla", **told)

    monkeypatch.setattr(jax.nn, "dot_product_attention", even)
    (q, k, v, _), rules = inputs(case)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    values = jax.jit(of_name("cudnn"))(*arrays, mask_of(rules))
    np.testing.assert_allclose(values, oracle(q, k, v, rules), atol=3e-6)
    gradients_fit("cudnn", case)


@pytest.mark.parametrize("names", combinations(), ids="+".join)
def test_every_combination_of_rules_where_it_is_held(names):
    """Values and gradients; and an error where it is not held."""
    rules = {name: RULES[name] for name in names}
    if "explicit" in rules:  # each query must see a key
        one = np.zeros((2, 1, 5, 5), bool)
        for b, i in itertools.product(range(2), range(5)):
            others = {name: rule for name, rule in rules.items() if name != "explicit"}
            one[b, 0, i, next(j for j in range(5) if is_seen(others, b, i, j))] = True
        rules["explicit"] = rules["explicit"] | one
    case = (2, 5, 5, 2, 8, rules)
    (q, k, v, _), _ = inputs(case)
    expected = oracle(q, k, v, rules)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    for name in ("xla", "xla_bf16"):
        values = jax.jit(of_name(name))(*arrays, mask_of(rules))
        np.testing.assert_allclose(values, expected, atol=3e-6)
    gradients_fit("xla", case)
    for name in ("xla_padded", "pallas", "cudnn"):
        extra = [kind for kind in mask_of(rules).kinds() if kind not in HOLDS[name]]
        if extra:
            with pytest.raises(ValueError, match=f"'{name}' holds no mask with {extra[0]}.*'xla'"):
                attend(*arrays, implementation=name, mask=mask_of(rules))


def test_a_mask_goes_through_a_loop_over_layers_and_stays_what_it_is():
    """In a scan the arrays of a mask are traced, and what is static stays so."""
    mask = AttentionMask(True, lengths=jnp.asarray([3, 2]))

    def body(x, mask):
        assert mask.causal is True and mask.kinds() == ("causal", "lengths")
        return x + attend(x, x, x, implementation="xla_padded", mask=mask)

    x = jnp.ones((2, 4, 1, 8))
    out, _ = jax.lax.scan(lambda x, _: (body(x, mask), None), x, None, length=2)
    np.testing.assert_allclose(out, 4 * np.ones_like(x), atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (AttentionMask(prefix=jnp.asarray([1, 1])), "prefix needs causal=True"),
        (AttentionMask(offset=jnp.asarray(1)), "offset needs causal=True"),
        (AttentionMask(segments=jnp.zeros((2, 3), int)), "3 tokens are not for 4 queries"),
    ],
)
def test_masks_without_a_meaning(mask, message):
    x = jnp.ones((2, 4, 1, 8))
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, implementation="xla", mask=mask)


@pytest.mark.parametrize("name", [*ON_CPU, "kernel"])
def test_bfloat16_is_near(name):
    (q, k, v, _), rules = inputs("image")
    expected = oracle(q, k, v, rules)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = jax.jit(of_name(name))(*arrays, mask_of(rules))
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
        return attend(q, k, v, implementation="pallas", mask=AttentionMask(lengths=lengths))

    spread = NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))
    with rules.use_mesh(mesh), pltpu.force_tpu_interpret_mode():
        arrays = jax.device_put((q, k, v, lengths), spread)
        lowered = jax.jit(run).lower(*arrays)
        out = lowered.compile()(*arrays)
    np.testing.assert_allclose(out, oracle(q, k, v, {"lengths": lengths}), atol=3e-6)
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
