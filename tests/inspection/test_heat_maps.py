"""Heat maps: what each method's values are, and that they find what is there to be found."""

import jax
import numpy as np
import pytest
from foreign import clip, images, random_params, siglip, token_ids
from modules import changed

from vlp_jax import interop
from vlp_jax.inspection import heat_map, heat_maps, overlay, patch_embeddings
from vlp_jax.inspection.heat_maps import PlaceValues, spread_out
from vlp_jax.models.layers import AttentionPooling

MODULES = {
    "cls": clip(),
    "mean": clip(image=dict(pooling="mean", registers=1)),
    "map": siglip(),
}


def of(name):
    module = MODULES[name]
    return module, interop.to_tree(module, random_params(module))


@pytest.mark.parametrize("name", MODULES)
def test_a_patch_is_embedded_as_the_pooling_would_see_it_alone(name):
    """Of a model whose last layer adds nothing, by the parts that come after it."""
    module, params = of(name)
    flat = random_params(module)
    for path in flat:
        if "image/encoder/layers/attention/out" in path or "image/encoder/layers/mlp/down" in path:
            flat[path][-1] = 0
    params = interop.to_tree(module, flat)
    image = images(32)
    got = np.asarray(jax.jit(lambda *x: patch_embeddings(module, *x))(params, image))
    assert got.shape == (3, 4, 4, module.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-5)
    one = module.clone(image=changed(module.image, depth=1))
    cut = {p: x[:1] if "image/encoder/layers/" in p else x for p, x in flat.items()}
    tree = interop.to_tree(one, cut)
    image_tower = one.image.clone(pooling="none")
    own = {name: x for name, x in tree["image"].items() if name != "pooling"}
    pixels = one.pixels.normalize(image)
    tokens = image_tower.apply({"params": own}, pixels)[:, one.image.prefix_tokens :]
    if name == "map":
        pooling = AttentionPooling(one.image.transformer)
        each = tokens.reshape(-1, 1, one.image.width)
        features = pooling.apply({"params": tree["image"]["pooling"]}, each).reshape(3, 16, -1)
    else:
        features = np.asarray(tokens) @ flat["image_projection/kernel"]
    expected = features / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(got.reshape(3, 16, -1), expected, atol=2e-5)


@pytest.mark.parametrize("method", heat_maps.METHODS)
def test_maps_have_the_image_s_size_whatever_the_batch(method):
    module, params = of("cls")
    image, tokens = images(32), token_ids(41, 9, 5)
    whole = heat_map(module, params, image, tokens, method=method)
    assert whole.shape == (3, 32, 32) and whole.dtype == np.float32
    np.testing.assert_allclose(whole.max(axis=(1, 2)), 1, atol=1e-6)
    assert (whole >= 0).all() and (whole.std(axis=(1, 2)) > 0.01).all()
    parts = heat_map(module, params, image, tokens, method=method, batch_size=2)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_a_window_is_shown_or_hidden_and_the_rest_is_the_median_color():
    module, params = of("map")
    image, tokens = images(32, batch=2), token_ids(41, 9, 5, batch=2)
    texts = np.asarray(module.apply({"params": params}, tokens, method="embed_text"))
    embed = jax.jit(lambda x: module.apply({"params": params}, x, method="embed_image"))
    fill = np.median(image.reshape(2, -1, 3), axis=1).astype(np.uint8)[:, None, None]
    for hide, place in ((False, (3, 5)), (True, (7, 1))):
        values = heat_maps._window_similarities(module, params, image, texts, hide)
        top, left = 4 * place[0] - 6, 4 * place[1] - 6
        window = np.zeros((32, 32, 1), bool)
        window[max(top, 0) : top + 12, max(left, 0) : left + 12] = True
        shown = np.where(window ^ hide, image, fill)
        expected = (np.asarray(embed(shown)) * texts).sum(axis=-1)
        np.testing.assert_allclose(values[:, place[0] - 1, place[1] - 1], expected, atol=1e-5)


def test_texts_are_tokens_or_vectors_and_a_contrast_is_their_mean():
    module, params = of("map")
    image, tokens = images(32), token_ids(41, 9, 5)
    vectors = np.asarray(module.apply({"params": params}, tokens, method="embed_text"))
    by_tokens = heat_map(module, params, image, tokens, method="patches")
    by_vectors = heat_map(module, params, image, vectors, method="patches")
    np.testing.assert_allclose(by_tokens, by_vectors, atol=1e-5)
    against = heat_map(module, params, image, tokens, method="patches", against=vectors)
    moved = heat_map(module, params, image, vectors - vectors.mean(0), method="patches")
    np.testing.assert_allclose(against, moved, atol=1e-5)
    assert np.abs(against - by_tokens).max() > 0.05


def test_shifts_put_the_samples_where_the_patches_were():
    """A stand-in for the model: the brightness of each patch's own middle."""
    module, _ = of("map")
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 21:24, 9:12] = 255

    def middles(shifted):
        return shifted[:, 3::8, 3::8, 0].astype(np.float32)

    samples = heat_maps._shifted_samples(module, image, middles)
    assert list(heat_maps.shifts_of(module)) == [-4, -2, 0, 2]
    assert list(samples.rows) == list(range(0, 32, 2)) and samples.spread == 3.5
    down, across = np.unravel_index(samples.values[0].argmax(), samples.values[0].shape)
    assert abs(samples.rows[down] - 22.5) <= 2 and abs(samples.columns[across] - 10.5) <= 2
    (heat,) = spread_out(samples, (32, 32))
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(y - 22.5) <= 2 and abs(x - 10.5) <= 2


def test_a_map_fades_beyond_its_samples_and_a_flat_one_is_nought():
    values = np.zeros((2, 3, 3))
    values[0, 0, 2] = 4.0
    places = np.array([8.0, 16.0, 24.0])
    heat, flat = spread_out(PlaceValues(values, places, places, 3.0), (32, 48))
    assert heat.shape == (32, 48) and not flat.any()
    assert np.unravel_index(heat.argmax(), heat.shape) in {(7, 23), (7, 24), (8, 23), (8, 24)}
    assert heat[7, 23] == 1 > heat[3, 23] > heat[0, 23]
    np.testing.assert_allclose(heat[0, 23] / heat[4, 23], np.exp(-(7.5**2 - 3.5**2) / 18), 1e-5)


def test_what_does_not_fit_is_refused():
    module, params = of("cls")
    image, tokens = images(32), token_ids(41, 9, 5)

    def fails(message, image=image, tokens=tokens, **more):
        with pytest.raises(ValueError, match=message):
            heat_map(module, params, image, tokens, **more)

    fails(
        "unknown method 'gradcam' .known: windows, occlusion, patches, relevance", method="gradcam"
    )
    fails(r"images are uint8 \[n, 32, 32, 3\], not uint8 \(3, 16, 32, 3\)", image=image[:, :16])
    fails(r"the texts of 3 images are \[3, 9\], not \[2, 9\]", tokens=tokens[:2])
    fails(r"the texts of 3 images are \[3, 20\]", tokens=np.zeros((3, 9), np.float32))
    vectors = np.zeros((3, 20), np.float32)
    fails("takes token ids, and nothing to go against", tokens=vectors, method="relevance")
    fails("nothing to go against", method="relevance", against=vectors)


def test_an_overlay_keeps_the_image_and_orders_by_lightness():
    image = np.full((8, 8, 3), 120, np.uint8)
    image[:, 4:] = (255, 0, 0)
    heat = np.array([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0], [3.0, 3.0]])
    got = overlay(image, heat).astype(int)
    assert got.shape == image.shape
    light = got.sum(axis=-1)[::2, 0]
    assert light[0] < light[1] < light[2] == light[3]
    assert (got[:, 4:, 0] > got[:, :4, 0]).all()  # what is red is still redder
    with pytest.raises(ValueError, match="a map of 3 x 2 does not lie on 8 x 8 pixels"):
        overlay(image, heat[:3])
