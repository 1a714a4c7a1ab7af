"""Resizing and cropping of images, alone or fused with decoding.

A crop says which part of an image it needs, and what becomes of it. Alone, it takes that part of a
decoded image; after the `decode_image` of its field only that part is decoded (`fuse`), and the
result is the same. `resize.Resampler` resizes; the operations take its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.data.image_ops.decode import Part, cut, part_decoder, ratio_keeping
from vlp_jax.data.image_ops.fields import IMAGE, BoxRule, ImageField, check_range
from vlp_jax.data.image_ops.resize import Resampler, shortest_to_size
from vlp_jax.data.lazy_tensorflow import Example, Op, tf

# (spare rows and columns, int64 [2]; seed) -> how many come off in front, float64 [2]
Offset = Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"]


@dataclass(frozen=True)
class Crop:
    """An operation that turns a part of a decoded image into uint8 [size, size, 3].

    Attributes:
      place: (upright height and width, seed, min_side) -> the part, as `decode.part_decoder` says.
        `how` is float32 [4, 2], for y and x: scale and translation, as `Resampler.warp` takes
        them, and begin and extent of the result in the upright image, fractions of its sides.
      finish: (the part, uint8 [h, w, 3]; `how`; whether min_side was given) -> uint8
        [size, size, 3].
    """

    images: ImageField
    boxes: BoxRule
    place: Callable[[tf.Tensor, tf.Tensor, int | None], Part]
    finish: Callable[[tf.Tensor, tf.Tensor, bool], tf.Tensor]

    def __call__(self, example: Example, seed: tf.Tensor) -> Example:
        """Replaces the image and its boxes by the result."""
        image = self.images.decoded(example)
        _, begin, extent, how = self.place(tf.shape(image)[:2], seed, None)
        result = self.finish(cut(image, begin, extent), how, False)
        return self.boxes.write(self.images, example, result, how[2:])

    def decoding_op(self, **arguments: Any) -> Op:
        """The operation on an encoded image; takes the arguments of `decode_image`."""
        decode = part_decoder(**arguments)
        scaled = arguments.get("min_side") is not None
        file = ImageField("decode_image", arguments.get("field", IMAGE), arguments.get("into"))

        def apply(example: Example, seed: tf.Tensor) -> Example:
            part, how = decode(example, lambda sides, least: self.place(sides, seed, least))
            result = self.finish(part, how, scaled)
            decoded = file.write(example, part)  # boxes go along, as they do by `decode_image`
            return self.boxes.write(self.images, decoded, result, how[2:])

        return apply


def random_resized_crop(
    size: int,
    min_scale: float = 0.5,
    max_scale: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
    method: str = "bicubic",
    antialias: bool = True,
    field: str = IMAGE,
    into: str | None = None,
    box_fields: Sequence[str] | None = None,
    min_box_share: float | None = None,
) -> Crop:
    """Cuts out a random rectangle and resizes it to [size, size, 3] (Szegedy et al. 2014, sec. 6).

    The rectangle is drawn by `tf.image.stateless_sample_distorted_bounding_box`; if none fits
    within 100 attempts, it is the whole image.

    Args:
      size: side of the result, in pixels.
      min_scale, max_scale: area of the rectangle as a fraction of the image's, in (0, 1].
      min_ratio, max_ratio: width over height of the rectangle.
      method: "bilinear", "bicubic" or "lanczos3".
      antialias: whether the kernel widens when the image shrinks, as Pillow's does.
      field, into: the image, and the field of the result; None replaces the image.
      box_fields: the fields with a row for each box of the image, which lose the rows of the boxes
        that go; [] for none. Needed if the image has boxes.
      min_box_share: a box stays if at least this share of its area is in the rectangle, and is
        clipped; None for `fields.MIN_BOX_SHARE`.
    """
    op = "random_resized_crop"
    resampler = Resampler(op, size, method, antialias)
    check_range(op, min_scale, max_scale, "scale", 1)
    check_range(op, min_ratio, max_ratio, "ratio")

    def place(sides: tf.Tensor, seed: tf.Tensor, min_side: int | None) -> Part:
        areas, ratios = (min_scale, max_scale), (min_ratio, max_ratio)
        begin, extent = _random_rectangle(sides, seed, areas, ratios)
        window = [tf.cast(begin / sides, tf.float32), tf.cast(extent / sides, tf.float32)]
        ratio = ratio_keeping(tf.reduce_min(extent), min_side)
        scale = tf.cast(size * ratio / extent, tf.float32)
        if min_side is None:
            return ratio, begin, extent, tf.stack([scale, tf.zeros([2]), *window])
        # In the scaled image the rectangle need not begin or end at a whole pixel.
        start = tf.cast(begin / ratio, tf.float32)
        end = -(-(begin + extent) // ratio)
        # Whole pixels that cover the rectangle; `translation` says how far it lies inside of them.
        begin //= ratio
        translation = scale * (tf.cast(begin, tf.float32) - start)
        return ratio, begin, end - begin, tf.stack([scale, translation, *window])

    def finish(part: tf.Tensor, how: tf.Tensor, scaled: bool) -> tf.Tensor:
        return resampler.warp(part, how[0], how[1]) if scaled else resampler.fit(part)

    boxes = BoxRule(op, min_box_share, box_fields)
    return Crop(ImageField(op, field, into), boxes, place, finish)


def _random_rectangle(
    sides: tf.Tensor, seed: tf.Tensor, areas: tuple[float, float], ratios: tuple[float, float]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Begin and extent, int32 [2] each; arguments are ranges, as `random_resized_crop` has them."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([sides, [3]], 0),
        tf.zeros([0, 0, 4], tf.float32),
        seed=seed,
        min_object_covered=0.0,
        aspect_ratio_range=ratios,
        area_range=areas,
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return begin[:2], extent[:2]


def resize(
    size: int,
    method: str = "bicubic",
    antialias: bool = True,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Resizes to [size, size, 3] whatever the aspect ratio; arguments as `random_resized_crop`.

    Boxes stay, since they are fractions of the image.
    """
    resampler = Resampler("resize", size, method, antialias)
    images = ImageField("resize", field, into)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        return images.write(example, resampler.fit(images.decoded(example)))

    return apply


def resize_shortest_and_center_crop(
    size: int,
    method: str = "bicubic",
    antialias: bool = True,
    field: str = IMAGE,
    into: str | None = None,
    box_fields: Sequence[str] | None = None,
    min_box_share: float | None = None,
) -> Crop:
    """Resizes the shorter side to `size`, and cuts the middle [size, size, 3] out.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop. See
    `random_resized_crop` for the arguments.
    """
    op = "resize_shortest_and_center_crop"

    def offset(spare: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        # Rounds half to even, as Python does in torchvision.
        return tf.round(spare / 2)

    boxes, resampler = (
        BoxRule(op, min_box_share, box_fields),
        Resampler(op, size, method, antialias),
    )
    return _square(ImageField(op, field, into), boxes, resampler, offset)


def resize_shortest_and_random_crop(
    size: int,
    method: str = "bicubic",
    antialias: bool = True,
    field: str = IMAGE,
    into: str | None = None,
    box_fields: Sequence[str] | None = None,
    min_box_share: float | None = None,
) -> Crop:
    """Resizes the shorter side to `size`, and cuts a square [size, size, 3] out anywhere.

    "A random square crop from resized images" is CLIP's only augmentation (Radford et al. 2021,
    2.3). See `random_resized_crop` for the arguments.
    """
    op = "resize_shortest_and_random_crop"

    def offset(spare: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        drawn = tf.cast(tf.random.stateless_uniform([2], seed), tf.float64)
        return tf.floor(drawn * tf.cast(spare + 1, tf.float64))

    boxes, resampler = (
        BoxRule(op, min_box_share, box_fields),
        Resampler(op, size, method, antialias),
    )
    return _square(ImageField(op, field, into), boxes, resampler, offset)


def _square(images: ImageField, boxes: BoxRule, resampler: Resampler, offset: Offset) -> Crop:
    def place(sides: tf.Tensor, seed: tf.Tensor, min_side: int | None) -> Part:
        upright = tf.cast(sides, tf.float32)
        ratio = ratio_keeping(tf.reduce_min(sides), min_side)
        if min_side is not None:
            sides = -(-sides // ratio)
        begin, extent, scale, translation = shortest_to_size(
            sides, resampler, lambda spare: offset(spare, seed)
        )
        # `warp` puts pixel x of the scaled image at scale * (x - begin) + translation.
        pixel = tf.cast(ratio, tf.float32) / upright
        start = (tf.cast(begin, tf.float32) - translation / scale) * pixel
        how = tf.stack([scale, translation, start, resampler.size / scale * pixel])
        return ratio, begin, extent, how

    return Crop(images, boxes, place, lambda part, how, _: resampler.warp(part, how[0], how[1]))


# Pairs of operations that become one where they work on one field. (`resize` needs all pixels, so
# that after it nothing is left to save.)
FUSED: dict[tuple[str, str], Callable[..., Crop]] = {
    ("decode_image", "random_resized_crop"): random_resized_crop,
    ("decode_image", "resize_shortest_and_random_crop"): resize_shortest_and_random_crop,
    ("decode_image", "resize_shortest_and_center_crop"): resize_shortest_and_center_crop,
}
_PARTNERS = {name for pair in FUSED for name in pair}


def fuse(
    pairs: Sequence[tuple[str, Mapping[str, Any]]], ops: Sequence[tuple[str, Op]]
) -> list[tuple[str, Op]]:
    """Replaces pairs of operations in `FUSED` that follow each other on one field.

    The first of a pair becomes an operation that leaves the example as it is, and the second does
    the work of both, so that every operation keeps its place, its name and its seed. Between the
    two may stand only decodings and crops of other fields. `pairs` are (name, arguments), `ops`
    made of them.
    """
    # The list keeps its length, because the seed of an operation depends on its place.
    fused = list(ops)
    for number, (name, settings) in enumerate(pairs):
        second = _crop_of(pairs, number) if name == "decode_image" else None
        if second is not None:
            crop = FUSED[name, pairs[second][0]](**pairs[second][1])
            fused[number] = (name, _leave)
            fused[second] = (pairs[second][0], crop.decoding_op(**settings))
    return fused


def _crop_of(pairs: Sequence[tuple[str, Mapping[str, Any]]], number: int) -> int | None:
    """The place of the crop that decoding number `number` is fused with; None if there is none."""
    decoded, file = _fields(*pairs[number])[::-1]
    for second in range(number + 1, len(pairs)):
        read, written = _fields(*pairs[second])
        if read == written == decoded and (pairs[number][0], pairs[second][0]) in FUSED:
            return second
        # The file must stay as it is, and nobody else may ask for the pixels.
        others = pairs[second][0] in _PARTNERS and read != decoded
        if not others or written in (file, decoded):
            return None
    return None


def _fields(name: str, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The field that an image operation reads, and the field that it writes."""
    images = ImageField(name, arguments.get("field", IMAGE), arguments.get("into"))
    return images.field, images.target


def _leave(example: Example, seed: tf.Tensor) -> Example:
    return example
