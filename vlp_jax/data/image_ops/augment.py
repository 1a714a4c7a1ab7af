"""Random changes of uint8 RGB [h, w, 3]: colour, sharpness, erasing, mirroring, moving."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlp_jax.data.image_ops import pixels
from vlp_jax.data.image_ops.fields import IMAGE, ImageField, check_fill, check_number, check_range
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
    caption become wrong, and by 90 exchanged. An image with boxes, which cannot be moved, is
    refused.

    Args:
      degrees: from 0 to 180.
      interpolation: "nearest" or "bilinear".
      fill: the colour, or grey, of corners that come from outside.
      field, into: the image, and the field of the result; None replaces the image.
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

    An image with boxes, which cannot be moved, is refused.

    Args:
      fraction: from 0 to 1.
      fill: the colour, or grey, of what comes from outside.
      field, into: the image, and the field of the result; None replaces the image.
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


def random_op(
    images: ImageField,
    probability: float,
    change: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    moves: bool = False,
) -> Op:
    """The operation that applies `change` (image, seed) with a probability.

    If it `moves` pixels, images with boxes are refused.
    """
    check_number(images.op, probability, "probability", 0, 1)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        if moves:
            images.refuse_boxes(example)
        image = images.decoded(example)
        whether, how = tf.unstack(tf.random.split(seed, 2))

        def changed() -> tf.Tensor:
            return tf.ensure_shape(change(image, how), image.shape)

        if probability < 1:
            chosen = tf.random.stateless_uniform([], whether) < probability
            return images.write(example, tf.cond(chosen, changed, lambda: image))
        return images.write(example, changed())

    return apply


def color_jitter(
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Changes colours at random, in a random order, as torchvision's ColorJitter does.

    Args:
      brightness, contrast, saturation: a factor is drawn evenly from [max(0, 1 - it), 1 + it].
      hue: a turn is drawn evenly from [-it, it]; at most 0.5, half of the way round.
      probability: of changing an image at all.
      field, into: the image, and the field of the result; None replaces the image.
    """
    limits = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, value in limits.items():
        check_number("color_jitter", value, name, 0)
    check_number("color_jitter", hue, "hue", 0, 0.5)
    ranges = [(max(0.0, 1 - limit), 1 + limit) for limit in limits.values()] + [(-hue, hue)]
    functions = [pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue]
    used = [n for n, (low, high) in enumerate(ranges) if low < high]
    if not used:
        raise UserError("color_jitter: all strengths are 0; leave the operation out")

    def change(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        draw, shuffle = tf.unstack(tf.random.split(seed, 2))
        uniform = tf.unstack(tf.random.stateless_uniform([4], draw))
        # Sorting random numbers gives each order the same chance.
        order = tf.argsort(tf.random.stateless_uniform([len(used)], shuffle))

        def step(number: int, image: tf.Tensor) -> tf.Tensor:
            low, high = ranges[number]
            return functions[number](image, low + (high - low) * uniform[number])

        for place in range(len(used)):
            branches = [lambda n=number, i=image: step(n, i) for number in used]
            image = tf.switch_case(order[place], branches)
        return image

    return random_op(ImageField("color_jitter", field, into), probability, change)


def grayscale(probability: float = 0.1, field: str = IMAGE, into: str | None = None) -> Op:
    """Turns an image grey (three equal colours) with a probability.

    Args:
      probability: of changing an image at all.
      field, into: the image, and the field of the result; None replaces the image.
    """

    def change(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return tf.tile(pixels.luma(image), [1, 1, 3])

    return random_op(ImageField("grayscale", field, into), probability, change)


def gaussian_blur(
    probability: float = 0.5,
    min_sigma: float = 0.1,
    max_sigma: float = 2.0,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Blurs with a probability; the standard deviation, in pixels, is drawn evenly.

    The kernel ends at three times `max_sigma`. The defaults are from Chen et al. 2020 (SimCLR,
    appendix A).

    Args:
      probability: of changing an image at all.
      min_sigma, max_sigma: the range of the standard deviation.
      field, into: the image, and the field of the result; None replaces the image.
    """
    check_range("gaussian_blur", min_sigma, max_sigma, "sigma")
    radius = math.ceil(3 * max_sigma)

    def change(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        # TensorFlow wants the bounds of the range to differ.
        sigma = tf.random.stateless_uniform([], seed, min_sigma, max_sigma + 1e-6)
        return pixels.blur(image, sigma, radius)

    return random_op(ImageField("gaussian_blur", field, into), probability, change)


def solarize(
    probability: float = 0.2, threshold: int = 128, field: str = IMAGE, into: str | None = None
) -> Op:
    """Inverts, with a probability, the numbers that are at least the threshold.

    Args:
      probability: of changing an image at all.
      threshold: from 0 to 256.
      field, into: the image, and the field of the result; None replaces the image.
    """
    check_number("solarize", threshold, "threshold", 0, 256)
    return random_op(
        ImageField("solarize", field, into),
        probability,
        lambda image, seed: pixels.solarize(image, float(threshold)),
    )


def random_erasing(
    probability: float = 0.5,
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_ratio: float = 0.3,
    max_ratio: float = 1 / 0.3,
    fill: int | tuple[int, int, int] | str = "random",
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Covers a random rectangle with a probability (Zhong et al. 2020, algorithm 1).

    Boxes stay, also of what is covered.

    Args:
      probability: of covering anything.
      min_area, max_area: of the rectangle, as fractions of the image's.
      min_ratio, max_ratio: height over width; the logarithm is drawn evenly, as timm does. Of 10
        rectangles the first that fits is taken; if none does the image stays.
      fill: a colour, a grey, or "random" for a random number in every place.
      field, into: the image, and the field of the result; None replaces the image.
    """
    op = "random_erasing"
    check_range(op, min_area, max_area, "area", 1)
    check_range(op, min_ratio, max_ratio, "ratio")
    color = None if fill == "random" else check_fill(op, fill)
    logs = math.log(min_ratio), math.log(max_ratio)

    def change(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        draw, noise = tf.unstack(tf.random.split(seed, 2))
        sides = tf.shape(image)[:2]
        u = tf.random.stateless_uniform([10, 4], draw)
        area = (min_area + (max_area - min_area) * u[:, 0]) * tf.cast(
            tf.reduce_prod(sides), tf.float32
        )
        ratio = tf.exp(logs[0] + (logs[1] - logs[0]) * u[:, 1])
        extents = tf.stack([tf.sqrt(area * ratio), tf.sqrt(area / ratio)], 1)
        extents = tf.maximum(tf.cast(tf.round(extents), tf.int32), 1)
        fits = tf.reduce_all(extents <= sides, 1)
        chosen = tf.argmax(fits)
        # argmax gives the first that fits, and 0 if none does: then nothing is covered.
        extent = tf.where(fits[chosen], extents[chosen], 0)
        free = tf.cast(sides - extent + 1, tf.float32)
        begin = tf.cast(tf.floor(u[chosen, 2:] * free), tf.int32)
        rows = tf.range(sides[0])[:, None] - begin[0]
        columns = tf.range(sides[1])[None] - begin[1]
        inside = (rows >= 0) & (rows < extent[0]) & (columns >= 0) & (columns < extent[1])
        cover = tf.constant(color or (0, 0, 0), tf.uint8)
        if color is None:
            bits = tf.random.stateless_uniform(tf.shape(image), noise, 0, 256, tf.int32)
            cover = tf.cast(bits, tf.uint8)
        return tf.where(inside[..., None], cover, image)

    return random_op(ImageField(op, field, into), probability, change)
