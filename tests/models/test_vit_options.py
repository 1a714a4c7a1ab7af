"""Options of the image tower: positions, other tokens, masks, normalizations, random depth."""

import dataclasses
import functools

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from modules import apply, init, perturbed

from vlp_jax.models import layers
from vlp_jax.models.dense import norm
from vlp_jax.models.masking import kept_patches, mask_from_noise, random_mask, take_tokens
from vlp_jax.models.positions import resample, sincos_2d, square_grid
from vlp_jax.models.text import make_text
from vlp_jax.models.values import VARIANTS, ComputeConfig, TransformerConfig, tower_fields
from vlp_jax.models.vit import make_vit, patchify, unpatchify

KEY = jax.random.key(0)


def tiny(image_size=(16, 24), **fields):
    return make_vit("mu/8", image_size, **{"depth": 3, **fields})


def images(batch=3, size=(16, 24)):
    return jax.random.normal(jax.random.key(1), (batch, *size, 3))


def test_sincos_equals_the_formula_of_the_paper_term_by_term():
    grid, width = (3, 5), 16
    expected = np.zeros((15, width))
    for row in range(3):
        for column in range(5):
            for i in range(4):
                frequency = 1 / 10000 ** (i / 4)
                place = row * 5 + column
                expected[place, i] = np.sin(column * frequency)
                expected[place, 4 + i] = np.cos(column * frequency)
                expected[place, 8 + i] = np.sin(row * frequency)
                expected[place, 12 + i] = np.cos(row * frequency)
    np.testing.assert_allclose(sincos_2d(grid, width), expected, atol=1e-6)


def test_sincos_positions_are_no_parameters_but_tell_places_apart():
    model = tiny(position="sincos", pooling="none")
    params = perturbed(model, images())
    assert "position_embedding" not in params["params"]
    flat = jnp.ones_like(images())
    out = apply(model, params, flat)
    assert np.abs(out[:, 0] - out[:, 1]).max() > 1e-3
    without = apply(tiny(position="none", pooling="none"), params, flat)
    np.testing.assert_allclose(without[:, 0], without[:, 1], atol=1e-5)


def test_without_positions_patches_may_be_permuted():
    model = tiny(position="none", pooling="mean")
    params = perturbed(model, images())
    patches = patchify(images(), 8)[:, ::-1]
    shuffled = unpatchify(patches, (2, 3))
    np.testing.assert_allclose(
        apply(model, params, images()), apply(model, params, shuffled), atol=1e-5
    )


def test_unpatchify_is_the_inverse_of_patchify():
    np.testing.assert_array_equal(unpatchify(patchify(images(), 8), (2, 3)), images())


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((6, 6), (3, 3)), ((3, 5), (4, 2))])
def test_resampling_equals_torch_bicubic_antialias(old, new):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(1 + old[0] * old[1], 6)).astype(np.float32)
    image = torch.tensor(table[1:]).reshape(1, *old, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        image, new, mode="bicubic", antialias=True, align_corners=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    ours = resample(table, old, new, prefix_tokens=1)
    np.testing.assert_array_equal(ours[0], table[0])
    np.testing.assert_allclose(ours[1:], expected, atol=2e-6)


def test_resampling_to_the_same_grid_changes_no_bit():
    table = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    np.testing.assert_array_equal(resample(table, (2, 3), (2, 3), 1), table)


def test_a_grid_that_cannot_be_resampled():
    table = np.zeros((7, 4), np.float32)
    with pytest.raises(ValueError, match=r"7 rows cannot be resampled from a grid of 3 x 3"):
        resample(table, (3, 3), (4, 4), 1)
    with pytest.raises(ValueError, match="7 positions are no square grid"):
        square_grid(7)
    assert square_grid(49) == (7, 7)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("position", ["learned", "sincos", "none"])
def test_masked_tokens_are_those_of_the_whole_image(class_token, registers, position):
    """Without layers no token sees another, so that dropping some must drop rows and no more."""
    compute = ComputeConfig(scan_layers=False)
    fields = {"class_token": class_token, "registers": registers, "position": position}
    model = tiny(pooling="none", depth=0, compute=compute, **fields)
    params = perturbed(model, images())
    keep = jnp.asarray([[4, 0], [1, 5], [2, 3]])
    whole, masked = apply(model, params, images()), apply(model, params, images(), keep)
    prefix = class_token + registers
    assert masked.shape == (3, prefix + 2, 32)
    np.testing.assert_allclose(masked[:, :prefix], whole[:, :prefix], atol=1e-6)
    expected = take_tokens(whole[:, prefix:], keep)
    np.testing.assert_allclose(masked[:, prefix:], expected, atol=1e-6)


def test_hidden_patches_change_nothing():
    model = tiny(pooling="mean")
    params = perturbed(model, images())
    keep = jnp.asarray([[4, 0], [1, 5], [2, 3]])
    patches = patchify(images(), 8)
    rows = jnp.arange(3)[:, None]
    other = (100 + patches).at[rows, keep].set(patches[rows, keep])
    np.testing.assert_allclose(
        apply(model, params, images(), keep),
        apply(model, params, unpatchify(other, (2, 3)), keep),
        atol=1e-6,
    )


def test_all_patches_in_another_order_give_the_same_vector():
    model = tiny(pooling="map", registers=1)
    params = perturbed(model, images())
    keep = jnp.asarray([[5, 0, 3, 1, 4, 2]] * 3)
    np.testing.assert_allclose(
        apply(model, params, images(), keep), apply(model, params, images()), atol=1e-5
    )


def test_masks_partition_the_patches_and_differ_between_images():
    mask = jax.device_get(random_mask(KEY, 5, 12, 3))
    assert mask.keep.shape == (5, 3) and mask.hidden.sum() == 5 * 9
    for keep, restore, hidden in zip(*mask, strict=True):
        assert set(np.flatnonzero(hidden == 0)) == set(keep)
        assert sorted(restore) == list(range(12))
    assert len({tuple(row) for row in np.sort(mask.keep, axis=1)}) > 1


def test_restore_brings_tokens_back():
    noise = jax.random.uniform(KEY, (2, 6))
    mask = mask_from_noise(noise, 2)
    order = jnp.argsort(noise, axis=1)
    x = jax.random.normal(KEY, (2, 6, 4))
    np.testing.assert_array_equal(take_tokens(take_tokens(x, order), mask.restore), x)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(196, 0.75, 49), (196, 0.5, 98), (4, 0.75, 1), (10, 0.0, 10)]
)
def test_kept_patches_round_down(patches, ratio, kept):
    assert kept_patches(patches, ratio) == kept


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.95])
def test_bad_mask_ratios(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        kept_patches(8, ratio)


def test_mean_pooling_leaves_other_tokens_out():
    fields = dict(class_token=True, registers=2)
    params = perturbed(tiny(pooling="mean", **fields), images())
    tokens = apply(tiny(pooling="none", **fields), params, images())
    np.testing.assert_allclose(
        apply(tiny(pooling="mean", **fields), params, images()), tokens[:, 3:].mean(1), atol=1e-6
    )


def test_norm_after_pool_normalizes_the_mean_of_tokens_that_are_not():
    model = tiny(pooling="mean", norm_after_pool=True)
    params = perturbed(model, images())
    assert "norm" not in params["params"]["encoder"]
    inside = lambda module, _: module.name == "encoder"  # noqa: E731
    _, state = jax.jit(lambda p, x: model.apply(p, x, capture_intermediates=inside))(
        params, images()
    )
    pooled = state["intermediates"]["encoder"]["__call__"][0].mean(axis=1)
    expected = norm(model.transformer, jnp.float32, None).apply(
        {"params": params["params"]["norm"]}, pooled
    )
    np.testing.assert_allclose(apply(model, params, images()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        (True, "none"),
        (False, "full"),
        pytest.param(False, "none", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
    ],
)
def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean(scan_layers, remat):
    config = TransformerConfig(4, depth=2, mlp_dim=8, heads=2, stochastic_depth=0.5)
    compute = ComputeConfig(scan_layers=scan_layers, remat=remat)
    encoder = layers.Encoder(config, compute, final_norm=False)
    x = jnp.ones((4000, 2, 4)) * jnp.arange(4)
    params = perturbed(encoder, x[:1])
    still = apply(encoder, params, x[:1])

    @functools.partial(jax.jit, static_argnums=0)
    def drop(train, key):
        return encoder.apply(params, x, train=train, rngs={"drop_path": key})

    def dropped(train, key=KEY):
        return drop(train, key)

    np.testing.assert_allclose(dropped(False), jnp.broadcast_to(still, x.shape), atol=1e-5)
    out = dropped(True)
    # The first layer never drops; the second drops each of its two branches, or doubles it.
    assert len({tuple(np.round(row, 4)) for row in np.asarray(out[:, 0])}) == 4
    first = encoder.clone(config=dataclasses.replace(config, depth=1))
    one = {"params": {"layers": jax.tree.map(lambda p: p[:1], params["params"]["layers"])}}
    kept_out = apply(first, one, x[:1])[0]
    share = np.mean(np.abs(np.asarray(out) - np.asarray(kept_out)).max((1, 2)) < 1e-5)
    assert 0.2 < share < 0.3  # both branches of the second layer are dropped in a quarter
    assert np.abs(dropped(True, jax.random.key(5)) - out).max() > 1e-3


def test_stochastic_depth_without_training_needs_no_random_stream():
    model = tiny(stochastic_depth=0.3)
    apply(model, perturbed(model, images()), images())


def test_layer_scale_of_zero_leaves_the_input():
    config = TransformerConfig(4, depth=2, mlp_dim=8, heads=2, layer_scale=0.0)
    encoder = layers.Encoder(config, final_norm=False)
    x = jax.random.normal(KEY, (2, 3, 4))
    params = init(encoder, x)
    np.testing.assert_array_equal(apply(encoder, params, x), x)
    assert params["params"]["layers"]["layer_scale_mlp"]["scale"].shape == (2, 4)


def test_query_key_norm_bounds_the_logits():
    config = TransformerConfig(8, 1, 8, heads=2)
    attention = layers.MultiHeadAttention(dataclasses.replace(config, qk_norm=True))
    x = jax.random.normal(KEY, (2, 5, 8))
    params = init(attention, x, x)
    once, many = apply(attention, params, x, x), apply(attention, params, 50 * x, x)
    np.testing.assert_allclose(once, many, atol=1e-2)  # the size of the queries does not count
    plain = layers.MultiHeadAttention(config)
    assert np.abs(apply(plain, params, x, x) - apply(plain, params, 50 * x, x)).max() > 0.1


def test_padding_mask_hides_padding_from_every_token_and_every_pooling():
    ids = np.random.default_rng(0).integers(3, 50, (2, 9))
    ids[0, 6:] = 0
    ids = jnp.asarray(ids, jnp.int32)
    for pooling in ("mean", "map"):
        model = make_text(
            "mu", vocab_size=50, context_length=9, causal=False, pooling=pooling, padding_mask=True
        )
        params = perturbed(model, ids)
        moved = jax.tree.map(lambda x: x, params)
        table = moved["params"]["token_embedding"]["embedding"]
        moved["params"]["token_embedding"]["embedding"] = table.at[0].set(
            jnp.arange(32.0)
        )  # the padding
        out, other = apply(model, params, ids), apply(model, moved, ids)
        np.testing.assert_allclose(out[0], other[0], atol=1e-5)
        plain = model.clone(padding_mask=False)
        assert np.abs(apply(plain, params, ids)[0] - apply(plain, moved, ids)[0]).max() > 1e-3
        short = model.clone(context_length=6)
        cut = {"params": {**params["params"]}}
        cut["params"]["position_embedding"] = params["params"]["position_embedding"][:6]
        np.testing.assert_allclose(apply(short, cut, ids[:1, :6])[0], out[0], atol=1e-5)


def test_argmax_pooling_takes_the_highest_id():
    ids = jnp.asarray([[5, 49, 7, 0, 0, 0, 0, 0, 0]], jnp.int32)
    model = make_text("mu", vocab_size=50, context_length=9, pooling="argmax", eos_id=49)
    params = perturbed(model, ids)
    same = apply(model.clone(pooling="eos"), params, ids)
    np.testing.assert_allclose(apply(model, params, ids), same, atol=1e-6)
    higher = ids.at[0, 2].set(49)  # of equal ids the first counts, in both rules
    np.testing.assert_allclose(
        apply(model, params, higher), apply(model.clone(pooling="eos"), params, higher), atol=1e-6
    )


def test_variants_have_the_published_numbers_of_parameters():
    """Millions of parameters: Zhai et al. 2022 table 2; Dosovitskiy et al. 2021 table 1."""
    published = {"Ti": 5.5, "S": 21.7, "B": 86, "L": 303, "H": 632, "g": 1011, "G": 1843}
    for name, millions in published.items():
        size = VARIANTS[name]
        block = 4 * size.width**2 + 2 * size.width * size.mlp_dim + 9 * size.width + size.mlp_dim
        total = size.depth * block + 16 * 16 * 3 * size.width + 197 * size.width
        assert total / 1e6 == pytest.approx(millions, rel=0.02), name


def test_flops_of_a_masked_image_count_the_kept_tokens():
    model = make_vit("B/16", 224, pooling="none", class_token=True)
    ratio = closed_forms.vit(model, 49) / closed_forms.vit(model)
    assert 0.24 < ratio < 0.26


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_vit("B/16", (224, 230)), "do not tile an image of 224 x 230"),
        (lambda: make_vit("B/16", 224, class_token=False), "needs a class token"),
        (lambda: make_vit("B/16", 224, position="rope"), "known: learned, sincos, none"),
        (lambda: make_vit("mu/8", 16, width=34, heads=2, position="sincos"), "4 divides, not 34"),
        (lambda: make_vit("B/16", 224, pooling="none", norm_after_pool=True), "needs a pooling"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_fields_of_the_module_are_the_arguments_of_its_maker():
    model = make_vit("mu/8", 16, registers=3, qk_norm=True, layer_scale=0.1, pre_norm=True)
    fields = tower_fields(model)
    assert fields["registers"] == 3 and fields["qk_norm"] and fields["pre_norm"]
    assert fields["layer_scale"] == 0.1 and fields["image_size"] == (16, 16)
