"""Augmentations: each against Pillow and torchvision, and the distribution of its draws."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from vlp_jax.data.image_ops import pixels
from vlp_jax.data.image_ops.augment import rotation
from vlp_jax.data.image_ops.rand_augment import operations
from vlp_jax.data.ops import OPS, apply_ops, build_ops
from vlp_jax.errors import UserError


def photo(height=48, width=66):
    random = np.random.default_rng(1)
    coarse = random.integers(20, 236, (height // 6, width // 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def functional():
    """torchvision's functions; the build without compiled operators lacks their declarations."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            torch._C._get_schema(f"torchvision::{name}", "")  # other tests need them too
        except RuntimeError:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("torchvision.transforms.autoaugment")


def many(preprocess, image, count=200):
    """Results for many seeds, from one dataset, as the pipeline makes them."""
    ops = build_ops(preprocess)

    def process(number):
        seeds = tf.stack([tf.stack([tf.cast(number, tf.int32), 5])] * len(ops))
        return apply_ops(ops, {"image": tf.ensure_shape(unknown, [None, None, 3])}, seeds)["image"]

    unknown = tf.constant(np.asarray(image))
    process = tf.autograph.experimental.do_not_convert(process)
    return np.stack(list(tf.data.Dataset.range(count).map(process).as_numpy_iterator()))


def difference(result, expected):
    return np.abs(np.asarray(result).astype(int) - np.asarray(expected).astype(int))


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_enhancements_are_pillows(name, factor):
    pillow = {"saturation": "Color"}.get(name, name.capitalize())
    expected = getattr(ImageEnhance, pillow)(photo()).enhance(factor)
    result = getattr(pixels, name)(np.asarray(photo()), factor)
    assert result.dtype == tf.uint8
    assert difference(result, expected).max() <= 2 and difference(result, expected).mean() < 0.6


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_histogram_operations_are_pillows(name):
    for image in (
        photo(),
        Image.new("RGB", (8, 8), (3, 200, 7)),
        photo().quantize(4).convert("RGB"),
    ):
        expected = getattr(ImageOps, name)(image)
        result = getattr(pixels, name)(np.asarray(image))
        assert difference(result, expected).max() <= (1 if name == "autocontrast" else 0)


def test_posterize_and_solarize_are_pillows():
    image = np.asarray(photo())
    for bits in range(4, 9):
        expected = ImageOps.posterize(photo(), bits)
        np.testing.assert_array_equal(pixels.posterize(image, tf.constant(bits)), expected)
    np.testing.assert_array_equal(pixels.solarize(image, 99), ImageOps.solarize(photo(), 99))


def test_hue_is_torchvisions(functional):
    from torchvision.transforms import functional as F  # noqa: N812

    for turn in (-0.5, -0.1, 0.0, 0.3):
        result = pixels.hue(np.asarray(photo()), turn)
        # On a PIL image hue has 256 steps; as a tensor it is computed in float.
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(np.asarray(photo()).copy()).permute(2, 0, 1)
        expected = F.adjust_hue(tensor, turn).permute(1, 2, 0).numpy()
        assert difference(result, expected).max() <= 1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_the_formula(sigma):
    radius, image = 6, np.asarray(photo()).astype(np.float64)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, pad, mode="reflect")
        image = sum(
            weight * np.take(padded, np.arange(image.shape[axis]) + place, axis=axis)
            for place, weight in enumerate(weights)
        )
    result = pixels.blur(np.asarray(photo()), sigma, radius)
    assert np.abs(result.numpy() - image).max() <= 0.51
    assert pixels.blur(np.asarray(photo())[:2, :3], sigma, radius).shape == (2, 3, 3)


@pytest.mark.parametrize("angle", [-40, 7, 90, 180])
def test_rotation_is_pillows(angle):
    expected = photo().rotate(angle, Image.Resampling.BILINEAR, fillcolor=(9, 99, 199))
    matrix = rotation(tf.constant(np.deg2rad(angle), tf.float32))
    image = np.asarray(photo())
    result = pixels.affine(image, matrix, tf.zeros([2]), "bilinear", (9, 99, 199))
    # They differ in how the colour outside comes in at the edge.
    assert (difference(result, expected) > 2).mean() < 0.06


TORCHVISION = {
    "shear_x": ("ShearX", 0.3),
    "shear_y": ("ShearY", 0.3),
    "translate_x": ("TranslateX", 150 / 331 * 66),
    "translate_y": ("TranslateY", 150 / 331 * 48),
    "rotate": ("Rotate", 30),
    "brightness": ("Brightness", 0.9),
    "color": ("Color", 0.9),
    "contrast": ("Contrast", 0.9),
    "sharpness": ("Sharpness", 0.9),
    "posterize": ("Posterize", None),
    "solarize": ("Solarize", None),
    "autocontrast": ("AutoContrast", None),
    "equalize": ("Equalize", None),
    "identity": ("Identity", None),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_rand_augment_operations_are_torchvisions(functional, name):
    from torchvision.transforms import InterpolationMode

    assert set(operations((0, 0, 0))) == set(TORCHVISION)
    theirs, largest = TORCHVISION[name]
    for step, sign in ((0, 1), (9, -1), (21, 1), (30, -1)):
        strength = step / 30
        if name == "posterize":
            size = 8 - int(np.round(step / (30 / 4)))
        elif name == "solarize":
            size = 255 - 255 * step / 30
        else:
            size = (largest or 0) * strength * sign
        expected = functional._apply_op(
            photo(), theirs, size, InterpolationMode.NEAREST, [10, 20, 30]
        )
        function = operations((10, 20, 30))[name]
        result = function(np.asarray(photo()), tf.constant(strength, tf.float32), float(sign))
        # Nearest pixels may round the other way where a position falls between two.
        assert (difference(result, expected) > 2).mean() < 0.03, (step, sign)


def test_rand_augment_draws_all_operations_and_follows_its_seed():
    image = photo()
    results = many({"rand_augment": {"num_layers": 1, "magnitude": 20}}, image, 300)
    same = (results == np.asarray(image)).all((1, 2, 3))
    assert 5 < same.sum() < 60
    found = {r.tobytes() for r in results}
    # 3 without a size, 10 of either sign, of which posterize and solarize know none.
    assert 20 <= len(found) <= 24
    again = many({"rand_augment": {"num_layers": 1, "magnitude": 20}}, image, 20)
    np.testing.assert_array_equal(again, results[:20])
    varied = {"num_layers": 2, "magnitude": 9, "magnitude_std": 0.5}
    assert len({r.tobytes() for r in many({"rand_augment": varied}, image, 100)}) > 80


def test_color_jitter_draws_evenly_and_in_any_order():
    grey = np.full((4, 4, 3), 100, np.uint8)
    levels = many({"color_jitter": {"brightness": 0.4}}, grey)[:, 0, 0, 0] / 100
    assert 0.59 < levels.min() < 0.65 and 1.35 < levels.max() < 1.41
    assert abs(levels.mean() - 1) < 0.06 and abs(levels.std() - 0.8 / 12**0.5) < 0.04
    strong = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2}
    results = many({"color_jitter": {**strong, "probability": 0.5}}, photo())
    unchanged = (results == np.asarray(photo())).all((1, 2, 3)).mean()
    assert 0.38 < unchanged < 0.62
    # Brightness 0 makes all black; contrast after it keeps that, before it, too: but solid contrast
    # 0 to 2 about the mean depends on the order.
    split = np.zeros((2, 2, 3), np.uint8)
    split[0] = 200
    means = many({"color_jitter": {"brightness": 1.0, "contrast": 1.0}}, split).mean((1, 2, 3))
    assert means.std() > 20


def test_grayscale_solarize_and_blur_happen_as_often_as_asked():
    image = np.asarray(photo())
    for op, settings in (
        ("grayscale", {"probability": 0.3}),
        ("solarize", {"probability": 0.3}),
        ("gaussian_blur", {"probability": 0.3, "min_sigma": 0.5}),
    ):
        results = many({op: settings}, image)
        changed = (results != image).any((1, 2, 3))
        assert 0.18 < changed.mean() < 0.42
        if op == "grayscale":
            grey = results[changed]
            assert (grey == grey[..., :1]).all()
            assert difference(grey[0][..., 0], photo().convert("L")).max() <= 1
        if op == "gaussian_blur":
            assert len({r.tobytes() for r in results[changed]}) == changed.sum()


def test_random_erasing():
    image = np.full((40, 60, 3), 7, np.uint8)
    settings = {"probability": 0.8, "min_area": 0.1, "max_area": 0.2, "fill": 255}
    results = many({"random_erasing": settings}, image, 300)
    areas, ratios, starts = [], [], []
    for covered in (results == 255).all(-1):
        if covered.any():
            places = np.argwhere(covered)
            sides = np.ptp(places, axis=0) + 1
            assert sides.prod() == len(places)
            areas.append(len(places) / 2400)
            ratios.append(np.log(sides[0] / sides[1]))
            starts.append(places[0])
    assert 0.7 < len(areas) / 300 < 0.9
    assert 0.09 < min(areas) < 0.115 and 0.185 < max(areas) < 0.215
    assert min(ratios) > np.log(0.27) and max(ratios) < np.log(3.7)
    assert abs(np.mean(ratios)) < 0.25 and np.ptp(starts, axis=0).min() > 25
    noise = many({"random_erasing": {"probability": 1.0, "min_area": 0.3}}, image, 20)
    inside = noise[noise != 7]
    assert abs(inside.mean() - 127.5) < 4 and len(np.unique(inside)) > 240


def test_random_translation_and_rotation():
    rows, columns = np.mgrid[1:41, 1:61].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    shifts = []
    for moved in many({"random_translation": {"fraction": 0.25}}, image):
        middle = moved[20, 30].astype(int)
        shifts.append((middle[0] - 21, middle[1] - 31))
        inside = moved[..., 0] > 0
        assert (difference(moved[..., 0], rows)[inside] == abs(shifts[-1][0])).all()
    low, high = np.min(shifts, 0), np.max(shifts, 0)
    assert (low >= (-10, -15)).all() and (high <= (10, 15)).all()
    assert (low <= (-8, -13)).all() and (high >= (8, 13)).all()
    turned = many({"random_rotation": {"degrees": 20, "fill": 0}}, photo(), 100)
    still = many({"random_rotation": {"degrees": 0}}, photo(), 2)
    np.testing.assert_array_equal(still[0], np.asarray(photo()))
    empty = (turned == 0).all(-1).mean((1, 2))
    assert empty.min() < 0.03 and 0.08 < empty.max() < 0.3


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"rand_augment": {"magnitude": 31}}, "magnitude must be a number from 0 to 30"),
        ({"rand_augment": {"num_layers": 0}}, "num_layers"),
        ({"color_jitter": {}}, "all strengths are 0"),
        ({"color_jitter": {"hue": 0.6}}, "hue"),
        ({"grayscale": {"probability": 1.5}}, "probability"),
        ({"gaussian_blur": {"min_sigma": 3}}, "min_sigma"),
        ({"random_erasing": {"fill": 300}}, "fill"),
        ({"random_erasing": {"min_area": 0.5}}, "min_area"),
        ({"random_rotation": {"degrees": 10, "interpolation": "cubic"}}, "interpolation"),
        ({"random_translation": {"fraction": 2}}, "fraction"),
        ({"solarize": {"threshold": -1}}, "threshold"),
    ],
)
def test_bad_settings(preprocess, message):
    with pytest.raises(UserError, match=message) as caught:
        build_ops(preprocess)
    assert "\n" not in str(caught.value)


def test_the_table_runs_geometry_then_colour_then_erasing():
    names = list(OPS)
    order = ["decode_image", "resize", "flip_left_right", "random_rotation", "rand_augment"]
    order += ["color_jitter", "gaussian_blur", "random_erasing", "keep"]
    assert [name for name in names if name in order] == order
