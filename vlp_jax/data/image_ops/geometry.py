"""Operations that move pixels: mirroring, rotation, translation, on uint8 RGB [h, w, 3]."""

from __future__ import annotations

import math

from vlp_jax.data.image_ops import pixels
from vlp_jax.data.image_ops.fields import IMAGE, ImageField, check_fill, check_number
from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.errors import UserError


def flip_left_right(
    unless_text: str | None = r"\b(left|right)\b", field: str = IMAGE, into: str | None = None
) -> Op:
    """Mirrors half of the images, but none whose `text` the pattern occurs in.

    Args:
      unless_text: a regular expression (RE2), matched anywhere in `text` and in any case; None
        mirrors half of all images.
      field, into: the image, and the field of the result; None replaces the image.
        Boxes are mirrored too.
    """
    images = ImageField("flip_left_right", field, into)
    pattern = None
    if unless_text is not None:
        # \C is any byte: a dot would stop at text that is not valid UTF-8.
        pattern = rf"(?is)\C*(?:{unless_text})\C*"
        try:
            tf.strings.regex_full_match("", pattern)
        except tf.errors.InvalidArgumentError:
            reason = f"{unless_text!r} is not a regular expression of RE2"
            raise UserError(f"flip_left_right: unless_text={reason}") from None

    def apply(example: Example, seed: tf.Tensor) -> Example:
        image = images.decoded(example)
        flip = tf.random.stateless_uniform([], seed) < 0.5
        if pattern is not None:
            if "text" not in example or example["text"].dtype != tf.string:
                raise UserError(
                    "flip_left_right: there is no string 'text' to match unless_text with; put "
                    "choose_text before it, or set unless_text to None"
                )
            flip &= ~tf.strings.regex_full_match(example["text"], pattern)
        # The pattern guards captions such as "left of", which a mirrored image would make false.
        flipped = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)

        def move(boxes: tf.Tensor) -> tf.Tensor:
            top, left, bottom, right = tf.unstack(boxes, 4, axis=1)
            return tf.where(flip, tf.stack([top, 1 - right, bottom, 1 - left], 1), boxes)

        return images.write_moved(example, tf.ensure_shape(flipped, image.shape), move)

    return apply


def random_rotation(
    degrees: float,
    interpolation: str = "bilinear",
    fill: int | tuple[int, int, int] = 0,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Turns about the middle by an angle drawn evenly from [-degrees, degrees].

    No text is looked at: by more than a few degrees "above" and "below", "left" and "right" in a
    caption become wrong, and by 90 exchanged. Keep it small, or for images without captions.

    Args:
      degrees: from 0 to 180.
      interpolation: "nearest" or "bilinear".
      fill: the colour, or grey, of corners that come from outside.
      field, into: the image, and the field of the result; None replaces the image.

    Raises:
      UserError: a setting that is none; or the image has boxes, which cannot be moved.
    """
    op = "random_rotation"
    images = ImageField(op, field, into)
    check_number(op, degrees, "degrees", 0, 180)
    if interpolation not in ("nearest", "bilinear"):
        raise UserError(f"{op}: interpolation {interpolation!r} is not one of nearest, bilinear")
    color = check_fill(op, fill)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        images.refuse_boxes(example)
        image = images.decoded(example)
        angle = tf.random.stateless_uniform([], seed, -1.0, 1.0) * (degrees * math.pi / 180)
        moved = pixels.affine(image, rotation(angle), tf.zeros([2]), interpolation, color)
        return images.write(example, moved)

    return apply


def rotation(angle: tf.Tensor) -> tf.Tensor:
    """The matrix of `pixels.affine` that turns an image counterclockwise, by radians."""
    cosine, sine = tf.cos(angle), tf.sin(angle)
    return tf.stack([tf.stack([cosine, -sine]), tf.stack([sine, cosine])])


def random_translation(
    fraction: float,
    fill: int | tuple[int, int, int] = 0,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Shifts by whole pixels, drawn evenly up to `fraction` of each side, in all four directions.

    Args:
      fraction: from 0 to 1.
      fill: the colour, or grey, of what comes from outside.
      field, into: the image, and the field of the result; None replaces the image.

    Raises:
      UserError: a setting that is none; or the image has boxes, which cannot be moved.
    """
    op = "random_translation"
    images = ImageField(op, field, into)
    check_number(op, fraction, "fraction", 0, 1)
    color = check_fill(op, fill)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        images.refuse_boxes(example)
        image = images.decoded(example)
        sides = tf.cast(tf.shape(image)[1::-1], tf.float32)
        shift = tf.round(tf.random.stateless_uniform([2], seed, -1.0, 1.0) * fraction * sides)
        moved = pixels.affine(image, tf.eye(2), shift, "nearest", color)
        return images.write(example, moved)

    return apply
