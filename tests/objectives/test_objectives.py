"""Masked autoencoding, patch masks, microbatches and composites."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.objectives import make_objective
from vlp_jax.objectives.base import Context
from vlp_jax.objectives.masked_autoencoding import hidden_errors
from vlp_jax.objectives.microbatch import loss_in_parts

TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
TOKENIZER = types.SimpleNamespace(vocab_size=64, context_length=8, pad_id=0, eos_id=2)
IMAGE = {"variant": "mu/8", "image_size": 32, "class_token": True, "position": "sincos", **TOWER}
CONTRASTIVE = {
    "name": "contrastive",
    "embed_dim": 16,
    "image": {**IMAGE, "pooling": "mean"},
    "text": {"variant": "mu", **TOWER},
}
MAE = {"name": "masked_autoencoding", "image": IMAGE, "decoder": {**TOWER, "depth": 1}}
COMPOSITE = {
    "name": "composite",
    "parts": {"pairs": CONTRASTIVE, "mae": {**MAE, "weight": 0.5, "data": "extra"}},
}
SPEC = {
    "image": jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8),
    "text": jax.ShapeDtypeStruct((16, 8), jnp.int32),
    "extra/image": jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8),
}
KEY = jax.random.key(1)


def batch():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(
            rng.integers(0, 60 if spec.dtype == jnp.int32 else 256, spec.shape), spec.dtype
        )
        for name, spec in SPEC.items()
    }


def start(section):
    objective = make_objective(section, TOKENIZER)
    return objective, jax.jit(lambda key: nn.unbox(objective.init(key, SPEC)))(jax.random.key(0))


def value_and_grad(section, microbatches=1):
    objective, params = start(section)
    loss = loss_in_parts(objective, microbatches)
    function = jax.value_and_grad(lambda p: loss(p, batch(), Context(KEY))[0])
    return jax.jit(function)(params)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(
            {**CONTRASTIVE, "loss": "sigmoid", "mask_ratio": 0.5},
            id="sigmoid-masked",
        ),
        pytest.param(COMPOSITE, id="softmax-and-mae", marks=pytest.mark.slow),
    ],
)
def test_four_microbatches_equal_the_whole_batch(section):
    value, gradient = value_and_grad(section)
    parts_value, parts_gradient = value_and_grad(section, 4)
    np.testing.assert_allclose(parts_value, value, rtol=1e-5)
    total = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(parts_gradient), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * total
    assert total > 1e-2


def test_error_over_hidden_patches_equals_float64_definition():
    rng = np.random.default_rng(0)
    targets, prediction = rng.normal(size=(2, 3, 5, 12))
    hidden = np.asarray([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], float)
    mean = targets.mean(-1, keepdims=True)
    variance = ((targets - mean) ** 2).sum(-1, keepdims=True) / 11
    normalized = (targets - mean) / np.sqrt(variance + 1e-6)
    for goal, normalize in ((targets, False), (normalized, True)):
        error = ((prediction - goal) ** 2).mean(-1)
        expected = (error * hidden).sum(-1) / hidden.sum(-1)
        arrays = [jnp.asarray(x, jnp.float32) for x in (prediction, targets, hidden)]
        np.testing.assert_allclose(hidden_errors(*arrays, normalize), expected, rtol=1e-4)


def test_reconstruction_shows_visible_patches_as_they_are():
    objective, params = start(MAE)
    image = batch()["image"]
    mask = objective.mask(KEY, len(image))
    views = jax.jit(objective.reconstruct)(params, image, mask)
    assert views.shape == (16, 3, 32, 32, 3)
    np.testing.assert_allclose(views[:, 2], image / 255, atol=1e-5)
    grid = np.asarray(mask.hidden).reshape(16, 4, 4).repeat(8, 1).repeat(8, 2)[..., None] == 1
    np.testing.assert_allclose(
        np.where(grid, 0, views[:, 1]), np.where(grid, 0, views[:, 2]), atol=1e-5
    )
    np.testing.assert_allclose(views[:, 0][np.broadcast_to(grid, views[:, 0].shape)], 0.5)


def test_the_encoder_computes_on_a_quarter_of_the_tokens():
    def flops(ratio):
        layers = {"scan_layers": False}
        section = {**CONTRASTIVE, "mask_ratio": ratio, **layers}
        objective, params = start(section)
        fields = batch()

        def encode(params, keep):
            return objective.model.apply(
                {"params": params}, fields["image"], keep, method="embed_image"
            )

        kept = int(16 * (1 - ratio))
        keep = jnp.broadcast_to(jnp.arange(kept), (16, kept))
        return jax.jit(encode).lower(params, keep).compile().cost_analysis()["flops"]

    ratio = flops(0.75) / flops(0.0)
    print(f"compiled FLOPs of the encoder, 4 of 16 patches against all: {ratio:.2f}")
    assert ratio < 0.4  # a quarter of the patches, and the class token


def test_masks_are_for_training_alone():
    objective, params = start({**CONTRASTIVE, "mask_ratio": 0.5})
    plain, _ = start(CONTRASTIVE)

    def loss(one, train):
        return jax.jit(lambda p, b: one.loss(p, b, Context(KEY, train=train))[0])(params, batch())

    evaluated = loss(objective, False)
    np.testing.assert_allclose(evaluated, loss(plain, False), rtol=1e-6)
    assert abs(loss(objective, True) - evaluated) > 1e-4


def test_parts_of_a_composite_share_the_image_tower():
    _, gradient = value_and_grad(COMPOSITE)
    objective, params = start(COMPOSITE)
    mae = objective.parts()["mae"].objective
    extra = {"image": batch()["extra/image"]}

    def gradient_of(one, fields, index):
        context = Context(jax.random.fold_in(KEY, index))
        return jax.jit(jax.grad(lambda p: one.loss(p, fields, context)[0]))(params)

    alone = gradient_of(mae, extra, 1)
    kernel = lambda tree: tree["image"]["encoder"]["layers"]["mlp"]["up"]["kernel"]  # noqa: E731
    first = objective.parts()["pairs"]
    own = gradient_of(first.objective, first.fields(batch()), 0)
    np.testing.assert_allclose(kernel(gradient), kernel(own) + 0.5 * kernel(alone), atol=1e-5)
    assert np.abs(kernel(alone)).max() > 1e-5


def test_parts_that_do_not_fit_each_other():
    wide = {**MAE, "image": {**IMAGE, "mlp_dim": 128}, "data": None}
    objective = make_objective(
        {"name": "composite", "parts": {"pairs": CONTRASTIVE, "mae": wide}}, TOKENIZER
    )
    with pytest.raises(ValueError, match=r"image/encoder/layers/mlp.*in part 'mae'"):
        jax.eval_shape(lambda: objective.init(KEY, SPEC))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**MAE, "mask_ratio": 1.0}, "mask_ratio"),
        ({**MAE, "mask_ratio": 0.0}, "hides none"),
        ({**CONTRASTIVE, "image_head": "mlp"}, "known: linear, linear_bias, none"),
        ({**CONTRASTIVE, "image_head": "none"}, "does not end in embed_dim"),
        ({"name": "composite", "parts": {}}, "needs parts"),
        ({"name": "composite", "parts": {"a": {**MAE, "weight": 0}}}, "must be positive"),
    ],
)
def test_bad_sections(section, message):
    with pytest.raises(UserError, match=message):
        make_objective(section, TOKENIZER)
