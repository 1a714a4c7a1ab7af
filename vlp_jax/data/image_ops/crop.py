"""Operations that resize, and those that cut a part out first, alone or fused with decoding.

A crop says which part of an image it needs, and what becomes of it. Alone, it takes that part of a
decoded image; directly after `decode_image` only that part is decoded (`fuse`), and the result is
the same. How an image is resized says `resize.Resampler`, whose settings the operations take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlp_jax.data.image_ops.checks import check_range, decoded_image
from vlp_jax.data.image_ops.decode import cut, part_decoder, ratio_keeping
from vlp_jax.data.image_ops.resize import Resampler, shortest_to_size
from vlp_jax.data.lazy_tensorflow import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.image_ops.decode import Part
    from vlp_jax.data.lazy_tensorflow import Example, Op

    # (spare rows and columns, int64 [2]; seed) -> how many come off in front, float64 [2]
    Offset = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclass(frozen=True)
class Crop:
    """A part of an image, and how it becomes uint8 [size, size, 3].

    Attributes:
      name: of the operation.
      place: (upright height and width, seed, min_side) -> the part, as `decode.part_decoder` says.
      finish: (the part, uint8 [h, w, 3]; `how`; whether min_side was given) -> uint8
        [size, size, 3].
    """

    name: str
    place: Callable[[tf.Tensor, tf.Tensor, int | None], Part]
    finish: Callable[[tf.Tensor, tf.Tensor, bool], tf.Tensor]

    def op(self) -> Op:
        """The operation on an image that is decoded."""

        def apply(example: Example, seed: tf.Tensor) -> Example:
            tf = import_tensorflow()
            image = decoded_image(example, self.name)
            _, begin, extent, how = self.place(tf.shape(image)[:2], seed, None)
            return {**example, "image": self.finish(cut(image, begin, extent), how, False)}

        return apply

    def decoding_op(self, **arguments: Any) -> Op:
        """The operation on an image that is encoded; arguments are those of `decode_image`."""
        decode = part_decoder(**arguments)
        scaled = arguments.get("min_side") is not None

        def apply(example: Example, seed: tf.Tensor) -> Example:
            part, how = decode(example, lambda sides, least: self.place(sides, seed, least))
            return {**example, "image": self.finish(part, how, scaled)}

        return apply


def random_resized_crop(
    size: int,
    min_scale: float = 0.5,
    max_scale: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
    method: str = "bicubic",
    antialias: bool = True,
) -> Op:
    """Cuts out a random rectangle and resizes it to [size, size, 3] (Szegedy et al. 2014, sec. 6).

    The rectangle is that of `tf.image.stateless_sample_distorted_bounding_box`; if none fits
    within 100 attempts, it is the whole image.

    Args:
      size: side of the result, in pixels.
      min_scale, max_scale: area of the rectangle as a fraction of the image's, in (0, 1].
      min_ratio, max_ratio: width over height of the rectangle.
      method: "bilinear", "bicubic" or "lanczos3".
      antialias: whether the kernel widens when the image shrinks, as Pillow's does.
    """
    return _random_rectangle(
        size, min_scale, max_scale, min_ratio, max_ratio, method, antialias
    ).op()


def _random_rectangle(
    size: int,
    min_scale: float = 0.5,
    max_scale: float = 1.0,
    min_ratio: float = 3 / 4,
    max_ratio: float = 4 / 3,
    method: str = "bicubic",
    antialias: bool = True,
) -> Crop:
    op = "random_resized_crop"
    resampler = Resampler(op, size, method, antialias)
    check_range(op, min_scale, max_scale, "scale", 1)
    check_range(op, min_ratio, max_ratio, "ratio")

    def place(sides: tf.Tensor, seed: tf.Tensor, min_side: int | None) -> Part:
        tf = import_tensorflow()
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.concat([sides, [3]], 0),
            tf.zeros([0, 0, 4], tf.float32),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(min_ratio, max_ratio),
            area_range=(min_scale, max_scale),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        begin, extent = begin[:2], extent[:2]
        ratio = ratio_keeping(tf.reduce_min(extent), min_side)
        scale = tf.cast(size * ratio / extent, tf.float32)
        if min_side is None:
            return ratio, begin, extent, tf.stack([scale, tf.zeros([2])])
        # In the scaled image the rectangle need not begin or end at a whole pixel.
        start = tf.cast(begin / ratio, tf.float32)
        end = -(-(begin + extent) // ratio)
        begin //= ratio
        translation = scale * (tf.cast(begin, tf.float32) - start)
        return ratio, begin, end - begin, tf.stack([scale, translation])

    def finish(part: tf.Tensor, how: tf.Tensor, scaled: bool) -> tf.Tensor:
        return resampler.warp(part, how[0], how[1]) if scaled else resampler.fit(part)

    return Crop(op, place, finish)


def resize(size: int, method: str = "bicubic", antialias: bool = True) -> Op:
    """Resizes to [size, size, 3] whatever the aspect ratio; arguments as `random_resized_crop`."""
    resampler = Resampler("resize", size, method, antialias)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        return {**example, "image": resampler.fit(decoded_image(example, "resize"))}

    return apply


def resize_shortest_and_center_crop(
    size: int, method: str = "bicubic", antialias: bool = True
) -> Op:
    """Resizes the shorter side to `size`, and cuts the middle [size, size, 3] out.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop. Arguments are those of
    `random_resized_crop`.
    """
    return _center_square(size, method, antialias).op()


def _center_square(size: int, method: str = "bicubic", antialias: bool = True) -> Crop:
    def offset(spare: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        tf = import_tensorflow()
        del seed
        # Rounds half to even, as Python does in torchvision.
        return tf.round(spare / 2)

    return _square("resize_shortest_and_center_crop", size, method, antialias, offset)


def resize_shortest_and_random_crop(
    size: int, method: str = "bicubic", antialias: bool = True
) -> Op:
    """Resizes the shorter side to `size`, and cuts a square [size, size, 3] out anywhere.

    "A random square crop from resized images" is CLIP's only augmentation (Radford et al. 2021,
    2.3). Arguments are those of `random_resized_crop`.
    """
    return _random_square(size, method, antialias).op()


def _random_square(size: int, method: str = "bicubic", antialias: bool = True) -> Crop:
    def offset(spare: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        tf = import_tensorflow()
        drawn = tf.cast(tf.random.stateless_uniform([2], seed), tf.float64)
        return tf.floor(drawn * tf.cast(spare + 1, tf.float64))

    return _square("resize_shortest_and_random_crop", size, method, antialias, offset)


def _square(name: str, size: int, method: str, antialias: bool, offset: Offset) -> Crop:
    resampler = Resampler(name, size, method, antialias)

    def place(sides: tf.Tensor, seed: tf.Tensor, min_side: int | None) -> Part:
        tf = import_tensorflow()
        ratio = ratio_keeping(tf.reduce_min(sides), min_side)
        if min_side is not None:
            sides = -(-sides // ratio)
        begin, extent, scale, translation = shortest_to_size(
            sides, resampler, lambda spare: offset(spare, seed)
        )
        return ratio, begin, extent, tf.stack([scale, translation])

    return Crop(name, place, lambda part, how, _: resampler.warp(part, how[0], how[1]))


# Pairs of operations that become one where they follow each other directly. (`resize` needs all
# pixels, so that after it nothing is left to save.)
FUSED: dict[tuple[str, str], Callable[..., Crop]] = {
    ("decode_image", "random_resized_crop"): _random_rectangle,
    ("decode_image", "resize_shortest_and_random_crop"): _random_square,
    ("decode_image", "resize_shortest_and_center_crop"): _center_square,
}


def fuse(
    pairs: Sequence[tuple[str, Mapping[str, Any]]], ops: Sequence[tuple[str, Op]]
) -> list[tuple[str, Op]]:
    """Replaces pairs of operations in `FUSED`.

    The first of a pair becomes an operation that leaves the example as it is, and the second does
    the work of both, so that every operation keeps its place, its name and its seed.

    Args:
      pairs: (name, arguments) of each operation.
      ops: (name, operation), built of them.
    """
    fused = list(ops)
    for number in range(len(pairs) - 1):
        (first, settings), (second, arguments) = pairs[number : number + 2]
        if (first, second) in FUSED:
            crop = FUSED[first, second](**arguments)
            fused[number] = (first, _leave)
            fused[number + 1] = (second, crop.decoding_op(**settings))
    return fused


def _leave(example: Example, seed: tf.Tensor) -> Example:
    del seed
    return example
