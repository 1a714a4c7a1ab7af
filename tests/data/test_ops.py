"""Preprocessing operations: what comes out of each kind of file, and their random choices."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vlp_jax.data.ops import OPS, apply_ops, build_ops
from vlp_jax.errors import UserError

SEED = tf.constant([3, 4], tf.int32)


GRAPHS = {}  # of preprocessing, each traced once for all seeds


def run(preprocess, example, seed=0):
    if (key := repr(preprocess)) not in GRAPHS:
        ops = build_ops(preprocess)
        # In a graph, as the pipeline runs them; eagerly some mistakes would not show.
        graph = tf.function(lambda e, seeds: apply_ops(ops, e, seeds), autograph=False)
        GRAPHS[key] = graph, len(ops)
    graph, count = GRAPHS[key]
    seeds = tf.constant([[seed, number] for number in range(count)], tf.int32)
    process = lambda e: graph(e, seeds)  # noqa: E731
    return {
        k: v.numpy() for k, v in process({k: tf.constant(v) for k, v in example.items()}).items()
    }


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decode(data: bytes, **arguments) -> np.ndarray:
    return run({"decode_image": arguments}, {"image": data})["image"]


def picture(height=48, width=64) -> Image.Image:
    """A smooth picture in which each corner has its own color."""
    corners = np.array([[[250, 10, 10], [10, 240, 10]], [[10, 10, 230], [240, 240, 20]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "webp", "jpeg"])
def test_decode_formats(kind):
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 98}}.get(kind, {})
    image = decode(encoded(picture(), kind, **options))
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    tolerance = {"gif": 30, "jpeg": 12}.get(kind, 0)
    assert np.abs(image.astype(int) - np.asarray(picture())).max() <= tolerance


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_grey_becomes_rgb(kind):
    grey = picture().convert("L")
    image = decode(encoded(grey, kind))
    assert np.abs(image.astype(int) - np.asarray(grey)[..., None]).max() <= (
        0 if kind == "png" else 8
    )


def test_palette_sixteen_bits_and_cmyk():
    palette = picture().quantize(16)
    np.testing.assert_array_equal(
        decode(encoded(palette, "png")), np.asarray(palette.convert("RGB"))
    )
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    np.testing.assert_array_equal(
        decode(encoded(deep, "png"))[..., 1], np.arange(256).reshape(16, 16)
    )
    cmyk = decode(encoded(picture().convert("CMYK"), "jpeg", quality=98))
    assert np.abs(cmyk.astype(int) - np.asarray(picture())).max() < 25


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp")])
def test_alpha_is_composited_on_white(mode, kind):
    image = picture().convert(mode)
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(48, 0)
    image.putalpha(Image.fromarray(ramp))
    # exact=True keeps the color of pixels that cannot be seen.
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image.convert("RGBA")))[..., :3]
    result = decode(encoded(image, kind, **options))
    assert np.abs(result.astype(int) - expected).max() <= 1
    assert (result[:, 0] == 255).all()


def test_transparent_palette_is_white():
    image = picture().quantize(8)
    data = encoded(image, "png", transparency=0)
    result = decode(data)
    hidden = np.asarray(image) == 0
    assert hidden.any() and (result[hidden] == 255).all() and (result[~hidden] != 255).any()


def test_bmp_padding_is_not_alpha():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert decode(encoded(image, "bmp")).mean() < 200


def test_min_side_decodes_large_jpegs_at_a_fraction():
    large = picture(600, 800)
    data = encoded(large, "jpeg", quality=98)
    assert decode(data, min_side=70).shape == (75, 100, 3)
    assert decode(data, min_side=75).shape == (75, 100, 3)
    assert decode(data, min_side=76).shape == (150, 200, 3)
    assert decode(data, min_side=400).shape == (600, 800, 3)
    scaled = run({"decode_image": {"min_side": 75}, "resize": {"size": 64}}, {"image": data})
    whole = run({"decode_image": {}, "resize": {"size": 64}}, {"image": data})
    assert np.abs(scaled["image"].astype(int) - whole["image"]).max() <= 6


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos3"])
@pytest.mark.parametrize(("height", "width"), [(200, 120), (20, 31), (64, 64), (100, 30)])
def test_resize_is_pillows(method, height, width):
    # Far from 0 and 255, where Pillow would clip what overshoots between its two passes.
    noise = np.random.default_rng(0).integers(70, 186, (height, width, 3), np.uint8)
    image = run({"resize": {"size": 64, "method": method}}, {"image": noise})["image"]
    resampling = {"bilinear": 2, "bicubic": 3, "lanczos3": 1}[method]
    expected = np.asarray(Image.fromarray(noise).resize((64, 64), resampling)).astype(int)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.abs(image - expected).max() <= 2
    assert np.abs((image - expected).mean()) < 0.05


def test_antialias_can_be_turned_off():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    smooth = run({"resize": {"size": 64}}, {"image": stripes})["image"]
    rough = run({"resize": {"size": 64, "antialias": False}}, {"image": stripes[:, 1:]})["image"]
    assert smooth[:, 4:-4].std() < 2 < rough.std()


def test_center_crop_keeps_the_middle():
    wide = picture(48, 96)
    result = run({"resize_shortest_and_center_crop": {"size": 24}}, {"image": np.asarray(wide)})
    expected = np.asarray(wide.resize((48, 24), Image.Resampling.BICUBIC).crop((12, 0, 36, 24)))
    assert np.abs(result["image"].astype(int) - expected).max() <= 2
    square = np.asarray(picture(24, 24))
    same = run({"resize_shortest_and_center_crop": {"size": 24}}, {"image": square})["image"]
    np.testing.assert_array_equal(same, square)


def test_random_square_crop_is_anywhere_along_the_longer_side():
    columns = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
    preprocess = {"resize_shortest_and_random_crop": {"size": 20}}
    crops = [run(preprocess, {"image": columns}, seed)["image"] for seed in range(80)]
    starts = {int(crop[0, 0, 0]) for crop in crops}
    assert starts <= set(range(41)) and {min(starts), max(starts)} <= {0, 1, 2, 38, 39, 40}
    assert len(starts) > 20
    for crop in crops:
        np.testing.assert_array_equal(crop - crop[:, :1], columns[:, :20])
    tall = run({"resize_shortest_and_random_crop": {"size": 24}}, {"image": picture(96, 48)})
    assert tall["image"].shape == (24, 24, 3)


def test_random_resized_crop_is_a_part_of_the_image_and_follows_its_seed():
    # Each pixel holds its own place, so that the rectangle can be read off.
    rows, columns = np.mgrid[:100, :100].astype(np.uint8)
    image = np.stack([rows, columns, rows], -1)
    preprocess = {"random_resized_crop": {"size": 32, "min_scale": 0.25, "max_scale": 0.5}}
    areas, crops = [], []
    for seed in range(40):
        crop = run(preprocess, {"image": image}, seed)["image"].astype(float)
        assert crop.shape == (32, 32, 3)
        height, width = np.ptp(crop[..., 0]) * 32 / 31, np.ptp(crop[..., 1]) * 32 / 31
        areas.append(height * width / 1e4)
        assert 0.70 < width / height < 1.43
        crops.append(crop)
    assert 0.2 < min(areas) < 0.32 and 0.43 < max(areas) < 0.55
    np.testing.assert_array_equal(crops[7], run(preprocess, {"image": image}, 7)["image"])
    assert len({crop.tobytes() for crop in crops}) == 40


def flips(text, count=60, **arguments):
    image = np.asarray(picture())
    op = OPS["flip_left_right"](**arguments)
    results = [
        op({"image": tf.constant(image), "text": tf.constant(text)}, tf.constant([n, 1]))["image"]
        for n in range(count)
    ]
    for result in results:
        assert np.array_equal(result, image) or np.array_equal(result, image[:, ::-1])
    return sum(not np.array_equal(result, image) for result in results)


def test_half_of_the_images_are_flipped_unless_the_text_forbids_it():
    assert 15 < flips("a red circle") < 45
    assert 15 < flips("a bright, upright copyright") < 45
    for text in ("a circle LEFT of it", "on the right", "one\nLeft\ntwo", b"right \xff"):
        assert flips(text, 20) == 0
    assert 15 < flips("on the right", unless_text=None) < 45
    assert flips("oben", 20, unless_text="oben|unten") == 0


def test_choose_text():
    captions = np.array([b"One", b"TWO", "DREI Ä".encode()], object)
    chosen = [run({"choose_text": {}}, {"captions": captions}, n)["text"] for n in range(40)]
    assert set(chosen) == set(captions)
    for index in range(3):
        text = run({"choose_text": {"index": index}}, {"captions": captions}, 5)["text"]
        assert text == captions[index]
    both = run({"choose_text": {"index": 2}, "lowercase": {}}, {"captions": captions})["text"]
    assert both.decode() == "drei ä"
    assert run({"choose_text": {"field": "title"}}, {"title": b"plain"})["text"] == b"plain"


def test_keep():
    kept = run({"keep": {"fields": ["b"]}}, {"a": np.int32(1), "b": np.int32(2)})
    assert kept == {"b": 2}


def test_a_mapping_runs_in_the_order_of_the_table_and_pairs_in_their_own():
    mapping = {"flip_left_right": {}, "decode_image": {}, "choose_text": {}}
    assert [n for n, _ in build_ops(mapping)] == ["choose_text", "decode_image", "flip_left_right"]
    pairs = [("resize", {"size": 8}), ("choose_text", {}), ("resize", {"size": 4})]
    assert [n for n, _ in build_ops(pairs)] == ["resize", "choose_text", "resize"]
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict({"preprocess": mapping})
    assert [n for n, _ in build_ops(config.preprocess)][0] == "choose_text"
    assert build_ops(None) == build_ops({}) == []


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"decode_imag": {}}, "did you mean 'decode_image'"),
        ({"resize": {"sise": 4}}, "did you mean 'size'"),
        ({"resize": {}}, "resize needs size"),
        ({"resize": {"size": 0}}, "above 0, got 0"),
        ({"resize": {"size": 8, "method": "cubic"}}, "'cubic' is not one of"),
        ({"random_resized_crop": {"size": 8, "min_scale": 0.9, "max_scale": 0.5}}, "min_scale"),
        ({"random_resized_crop": {"size": 8, "min_ratio": 2.0}}, "min_ratio"),
        ({"choose_text": {"index": -1}}, "index"),
        ({"flip_left_right": {"unless_text": "(left"}}, "not a regular expression"),
        ({"decode_image": {"min_side": 0}}, "min_side"),
    ],
)
def test_bad_settings(preprocess, message):
    with pytest.raises(UserError, match=message) as caught:
        build_ops(preprocess)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"choose_text": {"field": "caption"}}, "did you mean 'captions'"),
        ({"choose_text": {"field": "image"}, "resize": {"size": 4}}, "still encoded"),
        ({"decode_image": {}, "flip_left_right": {}}, "no string 'text'"),
        ({"keep": {"fields": ["imagе"]}}, "unknown key"),
    ],
)
def test_fields_that_do_not_fit(preprocess, message):
    example = {"image": encoded(picture(), "png"), "captions": np.array([b"x"], object)}
    with pytest.raises(UserError, match=message):
        run(preprocess, example)
