"""RandAugment: a few operations, chosen at random, at one strength (Cubuk et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlp_jax.data.image_ops import pixels
from vlp_jax.data.image_ops.augment import random_op, rotation
from vlp_jax.data.image_ops.fields import IMAGE, ImageField, check_count, check_fill, check_number
from vlp_jax.data.lazy_tensorflow import Op, tf

_MAX = 30  # of magnitudes


def rand_augment(
    num_layers: int = 2,
    magnitude: float = 10,
    magnitude_std: float = 0.0,
    fill: int | tuple[int, int, int] = 128,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Applies `num_layers` operations, each drawn evenly from 14.

    The 14 and their strengths equal torchvision's RandAugment with 31 bins, and the paper:
    identity, shear x and y (to 0.3), translate x and y (to 150/331 of the width and of the height),
    rotate (to 30 degrees), brightness, color, contrast, sharpness (factor 1 -+ 0.9), posterize (8
    to 4 bits), solarize (threshold 255 to 0), autocontrast and equalize. Those with a direction
    take either half of the time. Images are sampled at the nearest pixel; with boxes, which cannot
    be moved, they are refused.

    Args:
      num_layers: how many, one after the other; the paper's N.
      magnitude: 0 to 30 is none to the strongest; the paper's M.
      magnitude_std: the magnitude of each is drawn from a normal distribution about `magnitude`,
        clipped to 0 to 30 (0.5 in timm's "mstd0.5").
      fill: the colour, or grey, of what comes from outside.
      field, into: the image, and the field of the result; None replaces the image.
    """
    op = "rand_augment"
    check_count(op, num_layers, "num_layers", "operations")
    check_number(op, magnitude, "magnitude", 0, _MAX)
    check_number(op, magnitude_std, "magnitude_std", 0)
    color = check_fill(op, fill)

    def change(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        functions = operations(color)
        for layer in tf.unstack(tf.random.split(seed, num_layers)):
            which, size, side = tf.unstack(tf.random.split(layer, 3))
            strength = magnitude + magnitude_std * tf.random.stateless_normal([], size)
            strength = tf.clip_by_value(strength, 0.0, _MAX) / _MAX
            # Drawn for all operations alike, so that the seeds do not depend on the choice.
            sign = tf.where(tf.random.stateless_uniform([], side) < 0.5, -1.0, 1.0)
            number = tf.random.stateless_uniform([], which, 0, len(functions), tf.int32)
            branches = [
                lambda f=function, i=image, s=strength, d=sign: f(i, s, d)
                for function in functions.values()
            ]
            image = tf.switch_case(number, branches)
        return image

    return random_op(ImageField(op, field, into), 1.0, change, moves=True)


def operations(
    fill: tuple[int, int, int],
) -> dict[str, Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]]:
    """Name -> function of (image, strength from 0 to 1, sign -1 or 1)."""
    zero = tf.constant(0.0)

    def move(image: tf.Tensor, matrix: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return pixels.affine(image, matrix, tf.stack([x, y]), "nearest", fill)

    def shear(image: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        # Torchvision shears about the upper left corner.
        height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
        matrix = tf.stack([tf.stack([1.0, x]), tf.stack([y, 1.0])])
        return move(image, matrix, x * height / 2, y * width / 2)

    def translate(image: tf.Tensor, strength: tf.Tensor, axis: int) -> tf.Tensor:
        side = tf.cast(tf.shape(image)[1 - axis], tf.float32)
        way = -tf.cast(tf.cast(150 / 331 * side * strength, tf.int32), tf.float32)
        return move(image, tf.eye(2), way if axis == 0 else zero, way if axis == 1 else zero)

    def enhance(function: Callable) -> Callable:
        return lambda image, s, sign: function(image, 1 + 0.9 * s * sign)

    def rotate(image: tf.Tensor, s: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
        return move(image, rotation(s * sign * (30 * math.pi / 180)), zero, zero)

    def posterize(image: tf.Tensor, s: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
        return pixels.posterize(image, 8 - tf.cast(tf.round(4 * s), tf.int32))

    return {
        "identity": lambda image, s, sign: image,
        "shear_x": lambda image, s, sign: shear(image, 0.3 * s * sign, zero),
        "shear_y": lambda image, s, sign: shear(image, zero, 0.3 * s * sign),
        "translate_x": lambda image, s, sign: translate(image, s * sign, 0),
        "translate_y": lambda image, s, sign: translate(image, s * sign, 1),
        "rotate": rotate,
        "brightness": enhance(pixels.brightness),
        "color": enhance(pixels.saturation),
        "contrast": enhance(pixels.contrast),
        "sharpness": enhance(pixels.sharpness),
        "posterize": posterize,
        "solarize": lambda image, s, sign: pixels.solarize(image, 255 * (1 - s)),
        "autocontrast": lambda image, s, sign: pixels.autocontrast(image),
        "equalize": lambda image, s, sign: pixels.equalize(image),
    }
