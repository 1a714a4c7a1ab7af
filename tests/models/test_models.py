"""The towers: other people's layers as oracles, and properties that any Transformer has."""

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import apply, init, perturbed

from vlp_jax.models import layers
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.dense import norm
from vlp_jax.models.dual_encoder import DualEncoder, l2_normalize
from vlp_jax.models.text import make_text
from vlp_jax.models.values import PLAIN, ComputeConfig, Pixels, TransformerConfig
from vlp_jax.models.vit import PatchEmbedding, make_vit

KEY = jax.random.key(0)


def tiny_vit(compute=PLAIN, **fields):
    return make_vit("mu/8", 16, depth=3, compute=compute, **fields)


def tiny_text(**fields):
    return make_text("mu", vocab_size=50, context_length=9, depth=3, **fields)


def image(batch=2, size=16):
    return jax.random.normal(jax.random.key(1), (batch, size, size, 3))


def tokens(batch=2):
    ids = np.random.default_rng(0).integers(3, 50, (batch, 9))
    ids[:, 6:] = (2, 0, 0)  # end of text, padding
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_flax(causal):
    x = jax.random.normal(jax.random.key(2), (2, 5, 12))
    ours, see = layers.MultiHeadAttention(TransformerConfig(12, 1, 12, 3)), AttentionMask(causal)
    params = perturbed(ours, x, x)
    flax_attention = nn.MultiHeadDotProductAttention(num_heads=3)
    mask = nn.make_causal_mask(x[..., 0]) if causal else None
    expected = flax_attention.apply(params, x, x, mask=mask)
    np.testing.assert_allclose(apply(ours, params, x, x, see), expected, atol=1e-6)


def test_patch_embedding_equals_convolution():
    x = image(size=24)
    module = PatchEmbedding(patch_size=8, width=20)
    params = perturbed(module, x)
    conv = nn.Conv(20, (8, 8), strides=(8, 8), padding="VALID")
    expected = conv.apply({"params": params["params"]["projection"]}, x).reshape(2, 9, 20)
    np.testing.assert_allclose(apply(module, params, x), expected, atol=1e-5)


def test_layer_norm_equals_float64_definition():
    x = 100 + jax.random.normal(KEY, (4, 32))  # a fast variance would lose digits here
    module = norm(TransformerConfig(32, 1, 32, 1), jnp.float32, "norm")
    params = perturbed(module, x)
    x64 = np.asarray(x, np.float64)
    z = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6)
    p = params["params"]
    np.testing.assert_allclose(apply(module, params, x), z * p["scale"] + p["bias"], atol=2e-4)


@pytest.mark.parametrize(
    ("name", "torch_formula"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + np.vectorize(__import__("math").erf)(x / 2**0.5))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
    ],
)
def test_activations(name, torch_formula):
    x = np.linspace(-4, 4, 41)
    np.testing.assert_allclose(
        layers.ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), torch_formula(x), atol=1e-6
    )


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow), "map"])
def test_a_loop_over_layers_and_layers_written_out_are_the_same(pooling):
    loop, written_out = (
        tiny_vit(ComputeConfig(scan_layers=s), pooling=pooling) for s in (True, False)
    )
    params = perturbed(loop, image())
    outputs = []
    for model, loops in ((loop, 1), (written_out, 0)):
        program = jax.jit(model.apply).lower(params, image())
        assert program.as_text().count("stablehlo.while") == loops
        outputs.append(program.compile()(params, image()))
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        ("full", False),
        ("dots", True),
        pytest.param("dots", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_rematerialization_changes_no_gradient_and_saves_memory(remat, scan_layers):
    plain, remade = (
        tiny_vit(ComputeConfig(scan_layers=scan_layers, remat=r)) for r in ("none", remat)
    )
    params = perturbed(plain, image())

    def gradient(model):
        return jax.jit(jax.grad(lambda p: (model.apply(p, image()) ** 2).sum()))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(plain)(params),
        gradient(remade)(params),
    )
    kept = [
        len(jax.tree.leaves(jax.vjp(lambda p, m=m: m.apply(p, image()), params)[1]))
        for m in (plain, remade)
    ]
    assert kept[1] < kept[0]


def test_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="known: full, dots"):
        tiny_vit(ComputeConfig(remat="everything")).init(KEY, image())


def test_causal_text_does_not_see_what_follows():
    model = tiny_text(causal=True, pooling="last")
    encoder = tiny_text(causal=True, pooling="eos")
    ids = tokens()
    params = perturbed(encoder, ids)
    changed = ids.at[:, 7:].set(5)  # behind the end of text
    np.testing.assert_allclose(
        apply(encoder, params, ids), apply(encoder, params, changed), atol=1e-6
    )
    both = tiny_text(causal=False, pooling="eos")
    assert np.abs(apply(both, params, ids) - apply(both, params, changed)).max() > 1e-3
    assert np.abs(apply(model, params, ids) - apply(model, params, changed)).max() > 1e-3


def test_mean_pooling_leaves_padding_out():
    model = tiny_text(pooling="mean")
    ids = tokens()
    params = perturbed(model, ids)
    features = {}

    def keep(module, name):
        return module.name == "encoder" and name == "__call__"

    _, state = model.apply(params, ids, capture_intermediates=keep)
    features = state["intermediates"]["encoder"]["__call__"][0]
    expected = [f[: (row != 0).sum()].mean(axis=0) for f, row in zip(features, ids, strict=True)]
    np.testing.assert_allclose(apply(model, params, ids), np.stack(expected), atol=1e-5)


def test_eos_pooling_takes_the_first_end_of_text():
    model = tiny_text(pooling="eos")
    ids = tokens()
    params = perturbed(model, ids)
    twice = ids.at[:, 8].set(2)
    np.testing.assert_allclose(apply(model, params, ids), apply(model, params, twice), atol=1e-6)


@pytest.mark.parametrize(("pooling", "place"), [("first", 0), ("last", 8)])
def test_pooling_at_an_end_sees_the_token_that_is_there_if_attention_is_causal(pooling, place):
    model = tiny_text(pooling=pooling)
    ids = tokens()
    params = perturbed(model, ids)
    before = apply(model, params, ids)
    assert jnp.abs(apply(model, params, ids.at[:, place].add(1)) - before).max() > 1e-3
    if pooling == "first":
        after = apply(model, params, ids.at[:, 1:].add(1))
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_images_of_a_batch_do_not_mix():
    model = tiny_vit(pooling="map")
    params = perturbed(model, image())
    x = image(4)
    alone = jnp.concatenate([apply(model, params, x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(apply(model, params, x), alone, atol=1e-5)


def test_bfloat16_compute_keeps_float32_parameters():
    model = tiny_vit(ComputeConfig(jnp.bfloat16), pooling="map")
    params = init(model, image())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = apply(model, params, image())
    assert out.dtype == jnp.bfloat16
    reference = apply(tiny_vit(pooling="map"), params, image())
    np.testing.assert_allclose(out.astype(jnp.float32), reference, atol=0.1)


def dual(**fields):
    return DualEncoder(
        image=tiny_vit(pooling="map"),
        text=tiny_text(),
        embed_dim=8,
        logit_scale_init=2.0,
        logit_bias_init=-10.0,
        **fields,
    )


def test_every_parameter_but_scalars_has_logical_names():
    pixels = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    boxed = jax.eval_shape(lambda: dual().init(KEY, pixels, tokens(1)))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        shape = nn.unbox(leaf).shape
        assert is_box(leaf) == bool(shape), path
        if shape:
            assert len(leaf.names) == len(shape), path


def test_embeddings_are_unit_vectors_in_float32():
    pixels = jax.random.randint(KEY, (2, 16, 16, 3), 0, 256).astype(jnp.uint8)
    model = dual()
    params = perturbed(model, pixels, tokens())
    out = apply(model, params, pixels, tokens())
    for name in ("image", "text"):
        assert out[name].dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(out[name], axis=1), 1, rtol=1e-6)


def test_pixels_are_normalized_as_stated():
    pixels = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    out = Pixels((0.5, 0.4, 0.3), (0.5, 0.2, 0.1)).normalize(pixels)
    expected = [(0 - 0.5) / 0.5, (128 / 255 - 0.4) / 0.2, (1 - 0.3) / 0.1]
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)


def test_normalizing_zero_is_zero_and_has_a_gradient():
    zero = jnp.zeros((1, 4))
    np.testing.assert_array_equal(l2_normalize(zero), zero)
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(zero)).all()


@pytest.mark.parametrize(
    ("expected_gflops", "vit", "text"),
    [
        # open_clip, docs/model_profile.csv (its GFLOPs count a multiply-add as 2).
        (
            41.09,
            ("B/16", 224, {"pooling": "cls"}),
            (77, 512),
        ),
        (
            14.78,
            ("B/32", 224, {"pooling": "cls"}),
            (77, 512),
        ),
        (
            175.3,
            ("L/14", 224, {"pooling": "cls"}),
            (77, 768),
        ),
        (46.44, ("B/16", 224, {"pooling": "map"}), (64, 768)),
    ],
)
def test_flops_are_those_of_open_clip(expected_gflops, vit, text):
    variant, size, fields = vit
    context, width = text
    model = DualEncoder(
        image=make_vit(variant, size, **fields),
        text=make_text(
            "B",
            vocab_size=32_000,
            context_length=context,
            width=width,
            mlp_dim=4 * width,
            heads=width // 64,
        ),
        embed_dim=512,
        logit_scale_init=0.0,
    )
    assert closed_forms.dual_encoder(model) / 1e9 == pytest.approx(expected_gflops, rel=0.02)


def test_flops_equal_the_compilers_count_of_the_matrix_products():
    model = tiny_vit(ComputeConfig(scan_layers=False), pooling="map")
    params = init(model, image(1))
    compiled = jax.jit(model.apply).lower(params, image(1)).compile()
    counted = compiled.cost_analysis()["flops"]
    # The compiler also counts norms, softmax and activations, which are not small at this size.
    own = closed_forms.vit(model)
    assert own < counted < 1.35 * own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_vit("XXL/16", 224), "unknown variant 'XXL'"),
        (lambda: make_vit("B16", 224), "SIZE/PATCH"),
        (lambda: make_vit("B/15", 224), "do not tile"),
        (lambda: make_vit("B/16", 224, heads=7), "do not divide"),
        (lambda: make_vit("B/16", 224, pooling="max"), "known: cls, mean, map, none"),
        (
            lambda: make_text("B", vocab_size=10, context_length=10, pooling="cls"),
            "known: eos, argmax, first, last, mean, map",
        ),
        (
            lambda: tiny_vit().init(KEY, image(size=24)),
            "takes images of 16 x 16 pixels, not 24 x 24",
        ),
        (lambda: tiny_text().init(KEY, tokens()[:, :5]), "takes 9 tokens, not 5"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
