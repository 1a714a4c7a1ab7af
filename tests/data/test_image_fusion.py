"""Decoding fused with a crop gives what the two operations give apart; and the resize itself."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vlp_jax.data.image_ops import crop
from vlp_jax.data.image_ops.crop import FUSED
from vlp_jax.data.image_ops.resize import Resampler, shortest_to_size
from vlp_jax.data.ops import apply_ops, build_ops


def photo(height, width, seed=0):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="jpeg", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def runner(pairs):
    ops = build_ops(pairs)

    def process(data, seed):
        seeds = tf.stack([tf.stack([seed, number]) for number in range(len(ops))])
        return apply_ops(ops, {"image": data}, seeds)["image"]

    spec = [tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)]
    return tf.function(process, autograph=False, input_signature=spec)


def both_ways(first, second):
    """Fused, and apart, with the same seeds: an operation between the two keeps them apart."""
    fused = runner([("decode_image", first), second])
    keep = {"fields": ["image"]}
    apart = [("keep", keep), ("decode_image", first), ("keep", keep), second]
    ops = build_ops(apart)

    def process(data, seed):
        seeds = tf.stack([tf.stack([seed, number]) for number in (0, 0, 0, 1)])
        return apply_ops(ops, {"image": data}, seeds)["image"]

    spec = [tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.int32)]
    return fused, tf.function(process, autograph=False, input_signature=spec)


CROPS = [
    ("random_resized_crop", {"size": 40, "min_scale": 0.1}),
    ("resize_shortest_and_random_crop", {"size": 40}),
    ("resize_shortest_and_center_crop", {"size": 40, "method": "bilinear"}),
]


def test_the_table_of_pairs_is_what_is_tested():
    assert {second for _, second in FUSED} == {name for name, _ in CROPS}
    assert {first for first, _ in FUSED} == {"decode_image"}


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: crop[0])
def test_fused_is_the_same_as_apart(crop):
    fused, apart = both_ways({}, crop)
    exif = Image.Exif()
    files = [
        encoded(photo(120, 200)),
        encoded(photo(200, 120), subsampling=0),
        encoded(photo(64, 40), "png"),
        encoded(photo(40, 40)),
    ]
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        files.append(encoded(photo(120, 200), exif=exif))
    for number, data in enumerate(files):
        for seed in range(4):
            one, other = fused(data, seed + 9 * number), apart(data, seed + 9 * number)
            assert one.shape == (40, 40, 3)
            if crop[0] != "random_resized_crop" or number in (1, 2):
                np.testing.assert_array_equal(one, other)
            # libjpeg interpolates colour at half resolution, and at the edge of the rectangle lacks
            # the neighbour.
            difference = np.abs(one.numpy().astype(int) - other.numpy())
            assert (difference[3:-3, 3:-3] <= 1).all() and difference.max() <= 40
            assert (difference > 0).mean() < 0.1


def test_fused_decodes_only_what_it_needs():
    data = encoded(photo(400, 120), quality=95)
    # The lower third is missing, which decoding of all the image does not stand.
    crop = ("resize_shortest_and_center_crop", {"size": 60})
    fused, apart = both_ways({}, crop)
    cut = data[: int(0.8 * len(data))]
    np.testing.assert_array_equal(fused(cut, 0), apart(data, 0))
    with pytest.raises(tf.errors.InvalidArgumentError):
        apart(cut, 0)


def test_names_and_seeds_keep_their_places():
    pairs = {"decode_image": {}, "random_resized_crop": {"size": 8}, "lowercase": {}}
    assert [n for n, _ in build_ops(pairs)] == ["lowercase", "decode_image", "random_resized_crop"]
    assert crop.fuse([], []) == []


def test_min_side_holds_for_the_crop():
    data = encoded(photo(400, 640), quality=95)
    crop = {"size": 40, "min_scale": 0.02, "max_scale": 0.9}
    fused, exact = (
        runner([("decode_image", settings), ("random_resized_crop", crop)])
        for settings in ({"min_side": 40}, {})
    )
    for seed in range(12):
        scaled, whole = fused(data, seed).numpy().astype(int), exact(data, seed).numpy()
        assert np.abs(scaled - whole).mean() < 6
    small = encoded(photo(79, 79))
    for seed in range(3):
        np.testing.assert_array_equal(fused(small, seed), exact(small, seed))
    square = ("resize_shortest_and_random_crop", {"size": 40})
    one, other = both_ways({"min_side": 90}, square)
    np.testing.assert_array_equal(one(data, 3), other(data, 3))
    assert (one(data, 3).numpy() != both_ways({}, square)[0](data, 3).numpy()).any()


@pytest.mark.parametrize(
    ("method", "antialias"),
    [("bilinear", True), ("lanczos3", False)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("bilinear", False), ("bicubic", True), ("bicubic", False), ("lanczos3", True))
    ],
)
def test_two_passes_are_scale_and_translate(method, antialias):
    kernel = {"bilinear": "triangle", "bicubic": "keyscubic", "lanczos3": "lanczos3"}[method]
    resampler = Resampler("resize", 32, method, antialias)
    fit, warp = tf.function(resampler.fit), tf.function(resampler.warp)
    random = np.random.default_rng(0)
    for height, width in ((90, 70), (20, 25), (33, 20), (20, 50), (32, 32), (200, 64)):
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        for scale, shift in (
            (np.float32([32 / height, 32 / width]), np.zeros(2, np.float32)),
            (np.float32([0.9, 0.6]), np.float32([-3.0, -2.0])),
        ):
            exact = tf.raw_ops.ScaleAndTranslate(
                images=image[None],
                size=[32, 32],
                scale=scale,
                translation=shift,
                kernel_type=kernel,
                antialias=antialias,
            )[0]
            exact = np.clip(exact, 0, 255)
            results = [warp(image, scale, shift)] + ([] if shift.any() else [fit(image)])
            for result in results:
                assert np.abs(result.numpy().astype(float) - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(2, 30_000), (30_000, 2)], ids=["flat", "tall"])
def test_a_thin_image_takes_no_more_than_its_pixels(shape, monkeypatch):
    between, resample = [], Resampler._resample

    def noted(self, rows, scale, translation):
        result = resample(self, rows, scale, translation)
        between.append(int(tf.size(result)))
        return result

    monkeypatch.setattr(Resampler, "_resample", noted)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = Resampler("resize", 224, "bicubic", True).fit(tf.constant(image)).numpy()
    assert max(between) <= 224 * 224 * 3  # with the passes exchanged 20 million
    expected = Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_the_middle_of_a_long_image_is_where_it_should_be():
    fused, _ = both_ways({}, ("resize_shortest_and_center_crop", {"size": 24}))
    image = np.random.default_rng(0).integers(0, 256, (6, 30_000, 3), np.uint8)
    middle = fused(encoded(Image.fromarray(image[:, 14_991:15_009]), "png"), 1).numpy()
    for turned, expected in (
        (image, middle),
        (image.transpose(1, 0, 2), middle.transpose(1, 0, 2)),
    ):
        found = fused(encoded(Image.fromarray(turned), "png"), 1).numpy()
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_places_in_a_long_image_are_exact():
    """Its resized width is above what int32 holds, and float32 counts there by 512."""
    width, size = 40_000_001, 224
    resampler = Resampler("crop", size, "bicubic", True)
    begin, extent, scale, translation = shortest_to_size(
        tf.constant([1, width]), resampler, lambda spare: tf.round(spare / 2)
    )
    front = round((width * size - size) / 2)
    assert begin[1] <= front // size < begin[1] + extent[1] <= front // size + 10
    assert scale[1] == size and translation[1] == size * int(begin[1]) - front
