"""Image operations on fields of other names, views, fused decoding per field, and boxes."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from vlp_jax.data.ops import OPS, apply_ops, build_ops
from vlp_jax.data.pipeline import TrainPipeline
from vlp_jax.errors import UserError

# Each with settings under which it changes any picture.
ON_PIXELS = {
    "random_resized_crop": {"size": 24, "max_scale": 0.6},
    "resize": {"size": 24},
    "resize_shortest_and_random_crop": {"size": 24},
    "resize_shortest_and_center_crop": {"size": 24},
    "flip_left_right": {"unless_text": None},
    "random_rotation": {"degrees": 90},
    "random_translation": {"fraction": 0.5},
    "rand_augment": {"num_layers": 1, "magnitude": 20},
    "color_jitter": {"brightness": 0.9},
    "grayscale": {"probability": 1.0},
    "solarize": {"probability": 1.0},
    "gaussian_blur": {"probability": 1.0, "min_sigma": 1.0},
    "random_erasing": {"probability": 1.0},
}


def photo(height=60, width=90, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="png", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


PROGRAMS = {}  # operations -> their number and the traced function, for all seeds


def run(preprocess, example, seed=0, places=None):
    if repr(preprocess) not in PROGRAMS:
        ops = build_ops(preprocess)
        traced = tf.function(lambda e, seeds: apply_ops(ops, e, seeds), autograph=False)
        PROGRAMS[repr(preprocess)] = len(ops), traced
    count, process = PROGRAMS[repr(preprocess)]
    places = range(count) if places is None else places
    seeds = tf.constant([[seed, place] for place in places], tf.int32)
    found = process({k: tf.constant(v) for k, v in example.items()}, seeds)
    return {k: v.numpy() for k, v in found.items()}


def test_every_operation_on_pixels_is_tested():
    takes = {name for name, op in OPS.items() if "image_ops" in op.__module__}
    assert takes == {*ON_PIXELS, "decode_image"}


@pytest.mark.parametrize("name", ON_PIXELS)
def test_field_and_into(name):
    picture, other = photo(), photo(seed=1)
    arguments = ON_PIXELS[name]
    for seed in range(4):
        usual = run({name: arguments}, {"image": picture}, seed)["image"]
        moved = run(
            {name: {**arguments, "field": "frame"}}, {"image": other, "frame": picture}, seed
        )
        np.testing.assert_array_equal(moved["frame"], usual)
        np.testing.assert_array_equal(moved["image"], other)
        view = run({name: {**arguments, "into": "view"}}, {"image": picture}, seed)
        np.testing.assert_array_equal(view["view"], usual)
        np.testing.assert_array_equal(view["image"], picture)
    with pytest.raises(UserError, match="names of fields, got 3"):
        build_ops({name: {**arguments, "field": 3}})


def test_two_views_differ_and_each_follows_the_seed_of_its_place():
    crop = ("random_resized_crop", {"size": 24})
    pairs = [
        ("decode_image", {}),
        (crop[0], {**crop[1], "into": "first"}),
        (crop[0], {**crop[1], "into": "second"}),
    ]
    example = {"image": encoded(photo())}
    views = run(pairs, example, 5)
    assert views["first"].shape == views["second"].shape == (24, 24, 3)
    assert (views["first"] != views["second"]).any()
    assert views["image"].shape == (60, 90, 3)
    again = run([pairs[0], crop], example, 5, places=(0, 2))["image"]
    np.testing.assert_array_equal(views["second"], again)


CROP = {"size": 24, "min_scale": 0.2}
VIEWS = [
    [  # decodes only what each view needs
        ("decode_image", {"into": "a"}),
        ("decode_image", {"into": "b"}),
        ("random_resized_crop", {**CROP, "field": "a"}),
        ("resize_shortest_and_random_crop", {"size": 24, "field": "b"}),
    ],
    [  # a pair of files
        ("decode_image", {}),
        ("random_resized_crop", CROP),
        ("decode_image", {"field": "other"}),
        ("resize_shortest_and_center_crop", {"size": 24, "field": "other"}),
    ],
    [  # the pixels are asked for twice
        ("decode_image", {}),
        ("random_resized_crop", {**CROP, "into": "a"}),
        ("random_resized_crop", CROP),
    ],
    [  # the crop is of another field than the decoding
        ("decode_image", {}),
        ("decode_image", {"field": "other"}),
        ("random_resized_crop", {**CROP, "field": "other"}),
        ("random_resized_crop", CROP),
    ],
    [  # the crop reads one field and writes the other
        ("decode_image", {"into": "a"}),
        ("random_resized_crop", {**CROP, "field": "a", "into": "b"}),
    ],
    [  # the file is overwritten in between
        ("decode_image", {"into": "a"}),
        ("decode_image", {}),
        ("random_resized_crop", {**CROP, "field": "a"}),
        ("random_resized_crop", CROP),
    ],
]
FUSED = [2, 2, 0, 2, 0, 1]


@pytest.mark.parametrize(("pairs", "count"), list(zip(VIEWS, FUSED, strict=True)))
def test_fused_decoding_per_field_gives_the_same_as_apart(pairs, count):
    boxes = np.array([[0.1, 0.2, 0.6, 0.7], [0.0, 0.0, 1.0, 1.0], [0.9, 0.9, 1.0, 1.0]], np.float32)
    example = {"image": encoded(photo()), "other": encoded(photo(80, 50, 3))}
    example |= {"boxes": boxes, "other_boxes": boxes[::-1]}
    pairs = [
        (name, {**given, "box_fields": ()} if "crop" in name else given) for name, given in pairs
    ]
    fused = build_ops(pairs)
    assert sum(op.__name__ == "_leave" for _, op in fused if hasattr(op, "__name__")) == count
    for seed in range(6):
        together = run(pairs, example, seed)
        apart = dict(example)
        for place, pair in enumerate(pairs):
            apart = run([pair], apart, seed, places=[place])
        assert set(together) == set(apart)
        for name, value in apart.items():
            if name.endswith("boxes"):
                np.testing.assert_allclose(together[name], value, atol=1e-6)
            else:
                np.testing.assert_array_equal(together[name], value, err_msg=name)


def moved_by(window, boxes, min_share):
    """NumPy's boxes in a window (begin, extent) of the image, and which stay."""
    (y, x), (height, width) = window
    moved = (boxes.astype(np.float64) - [y, x, y, x]) / [height, width, height, width]
    clipped = moved.clip(0, 1)
    areas = [np.prod(np.maximum(b[:, 2:] - b[:, :2], 0), 1) for b in (clipped, moved)]
    kept = (areas[0] > 0) & (areas[0] >= min_share * areas[1])
    return clipped[kept], kept


RNG = np.random.default_rng(0)
CORNERS = np.sort(RNG.random((40, 2, 2)), 1)  # y and x of both corners
BOXES = np.concatenate([CORNERS[:, 0], CORNERS[:, 1]], 1).astype(np.float32)
LABELS = np.arange(40)


@pytest.mark.parametrize("share", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64), (50, 200)])
def test_the_middle_square_moves_boxes_as_numpy_does(height, width, share):
    arguments = {"size": 24, "box_fields": ["labels"], "min_box_share": share}
    example = {"image": photo(height, width), "boxes": BOXES, "labels": LABELS}
    found = run({"resize_shortest_and_center_crop": arguments}, example)
    side = np.array([height, width])
    resized = side * 24 // side.min()
    front = np.round((resized - 24) / 2)
    expected, kept = moved_by(
        (front / resized, 24 / resized), BOXES, 0.25 if share is None else share
    )
    assert kept.sum() > 0 and (kept.all() or height != width)
    np.testing.assert_array_equal(found["labels"], LABELS[kept])
    np.testing.assert_allclose(found["boxes"], expected, atol=2e-6)
    assert found["boxes"].dtype == np.float32


def test_flips_and_resizes_move_boxes_as_numpy_does():
    example = {"image": photo(), "boxes": BOXES, "labels": LABELS}
    found = run({"resize": {"size": 24}}, example)
    np.testing.assert_array_equal(found["boxes"], BOXES)
    mirrored = np.stack([BOXES[:, 0], 1 - BOXES[:, 3], BOXES[:, 2], 1 - BOXES[:, 1]], 1)
    flipped = 0
    for seed in range(12):
        found = run({"flip_left_right": {"unless_text": None}}, example, seed)
        is_flipped = (found["image"] != photo()).any()
        flipped += is_flipped
        np.testing.assert_array_equal(found["boxes"], mirrored if is_flipped else BOXES)
        np.testing.assert_array_equal(found["labels"], LABELS)
    assert 0 < flipped < 12


def drawn(height, width, boxes):
    """A black picture in which each box is filled with a colour of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, box in enumerate(boxes):
        top, left, bottom, right = np.round(box * [height, width, height, width]).astype(int)
        image[top:bottom, left:right, number] = 255
    return image


@pytest.mark.parametrize("min_side", ["decoded", None, 24])
@pytest.mark.parametrize(
    "name",
    ["random_resized_crop", "resize_shortest_and_random_crop", "resize_shortest_and_center_crop"],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_drawn_box_is_still_where_its_box_says(name, min_side, orientation):
    if orientation != 1 and min_side == "decoded":
        pytest.skip("pixels have no orientation")
    height, width, size = 240, 400, 48
    grid = np.array([height, width] * 2)
    boxes = np.array([[24, 80, 120, 200], [100, 200, 220, 360], [8, 8, 60, 392]]) / grid
    image = drawn(height, width, boxes)
    if min_side != "decoded":
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.rot90(image, 1) if orientation == 6 else image
        image = encoded(np.ascontiguousarray(stored), "jpeg", quality=98, subsampling=0, exif=exif)
    crop = (name, {"size": size, "box_fields": ("labels",), "min_box_share": 0.0})
    flip = ("flip_left_right", {"unless_text": None})
    decode = [] if min_side == "decoded" else [("decode_image", {"min_side": min_side})]
    example = {"image": image, "boxes": boxes.astype(np.float32), "labels": np.arange(3)}
    for seed in range(6):
        found = run([*decode, crop, flip], example, seed)
        for number in range(3):
            inside = found["image"][..., number] > 127
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            if number not in found["labels"]:
                assert rows.size * columns.size <= 2 * size  # no more than a seam
                continue
            box = found["boxes"][found["labels"].tolist().index(number)] * size
            if min(box[2] - box[0], box[3] - box[1]) < 2:
                continue
            seen = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
            assert np.abs(box - seen).max() <= 1.01, (seed, number, box, seen)


def test_views_have_boxes_and_labels_of_their_own():
    example = {"image": photo(), "boxes": BOXES, "labels": LABELS}
    crop = {"size": 24, "max_scale": 0.5, "box_fields": ["labels"]}
    pairs = [
        ("random_resized_crop", {**crop, "into": "a"}),
        ("random_resized_crop", {**crop, "into": "b"}),
        ("random_resized_crop", {**crop, "field": "b"}),
        ("grayscale", {"into": "c"}),
    ]
    found = run(pairs, example)
    np.testing.assert_array_equal(found["boxes"], BOXES)
    np.testing.assert_array_equal(found["c_boxes"], BOXES)
    np.testing.assert_array_equal(found["labels"], LABELS)
    for view in "ab":
        assert 0 < len(found[f"{view}_boxes"]) == len(found[f"{view}_labels"]) < 40
    assert found["a_labels"].tolist() != found["b_labels"].tolist()


def test_no_boxes_at_all_and_none_left():
    example = {"image": photo(), "boxes": np.zeros([0, 4], np.float32)}
    crop = {"size": 24, "box_fields": []}
    assert run({"random_resized_crop": crop}, example)["boxes"].shape == (0, 4)
    corner = np.array([[0.0, 0.0, 0.01, 0.01], [0.5, 0.5, 0.5, 0.5]], np.float32)
    found = run({"resize_shortest_and_center_crop": crop}, {**example, "boxes": corner})
    assert found["boxes"].shape == (0, 4)


def test_boxes_of_real_scenes_reach_batches():
    data = {
        "source": "tfds",
        "dataset": "shapes/tiny",
        "split": "train",
        "fields": {"image": "image", "boxes": "objects/bbox"},
        "preprocess": [
            ("decode_image", {}),
            ("random_resized_crop", {"size": 32, "box_fields": []}),
            ("pad_rows", {"fields": ["boxes"], "count": 3, "fill": -1}),
        ],
    }
    pipeline = TrainPipeline(data, None, batch_size=16, seed=0)
    assert pipeline.batch_spec()["boxes"] == ((16, 3, 4), np.dtype(np.float32))
    boxes = next(iter(pipeline.batches()))["boxes"]
    real = (boxes >= 0).all(-1)
    assert real.any() and (boxes[~real] == -1).all() and boxes.max() <= 1
    assert (boxes[real][:, 2:] > boxes[real][:, :2]).all()


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"random_resized_crop": {"size": 8}}, "set box_fields to the list of fields"),
        ({"random_resized_crop": {"size": 8, "box_fields": ["label"]}}, "did you mean 'labels'"),
        ({"random_resized_crop": {"size": 8, "box_fields": ["one"]}}, "'one' has no row for each"),
        ({"random_resized_crop": {"size": 8, "box_fields": "labels"}}, "a list of fields"),
        ({"random_resized_crop": {"size": 8, "min_box_share": 2}}, "from 0 to 1, got 2"),
        ({"random_rotation": {"degrees": 3}}, "random_rotation: it cannot move 'boxes'"),
        ({"random_translation": {"fraction": 0.1}}, "random_translation: it cannot move 'boxes'"),
        ({"rand_augment": {}}, "rand_augment: it cannot move 'boxes'"),
        (
            {"resize_shortest_and_center_crop": {"size": 8, "field": "bare", "box_fields": []}},
            "'bare' has no 'bare_boxes'",
        ),
        ({"grayscale": {"field": "wrong"}}, "'wrong_boxes' must be float32"),
        ({"pad_rows": {"fields": "boxes", "count": 2}}, "a list of names"),
        ({"pad_rows": {"fields": ["boxes"], "count": 0}}, "above 0, got 0"),
        ({"pad_rows": {"fields": ["one"], "count": 2}}, "'one' is no list of numbers"),
        ({"pad_rows": {"fields": ["boxes"], "count": 2, "fill": "a"}}, "must be a number"),
    ],
)
def test_mistakes_are_one_line(preprocess, message):
    example = {"image": photo(), "boxes": BOXES, "labels": LABELS, "one": np.int32(1)}
    example |= {"bare": photo(), "wrong": photo(), "wrong_boxes": np.zeros([2, 4], np.int32)}
    with pytest.raises(UserError, match=message) as caught:
        run(preprocess, example)
    assert "\n" not in str(caught.value)
