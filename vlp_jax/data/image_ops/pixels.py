"""Functions on one image with fixed parameters, uint8 [h, w, 3] to the same, within a graph.

They compute what Pillow's ImageEnhance and ImageOps do, which Cubuk et al. 2020 and torchvision
use, up to a rounding; factors are float32 [], 1 leaves an image as it is.
"""

from __future__ import annotations

from vlp_jax.data.lazy_tensorflow import tf


def round_to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds and clips numbers to 0 to 255."""
    return tf.cast(tf.clip_by_value(image + 0.5, 0, 255), tf.uint8)


def luma(image: tf.Tensor) -> tf.Tensor:
    """Computes grey, uint8 [h, w, 1], with the weights of ITU-R BT.601."""
    weights = tf.constant([[0.299], [0.587], [0.114]])
    return round_to_uint8(tf.tensordot(tf.cast(image, tf.float32), weights, 1))


def blend(base: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Computes base + factor * (image - base); a factor above 1 goes beyond the image."""
    base, image = tf.cast(base, tf.float32), tf.cast(image, tf.float32)
    return round_to_uint8(base + factor * (image - base))


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with black."""
    return blend(0, image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the mean grey."""
    return blend(tf.round(tf.reduce_mean(tf.cast(luma(image), tf.float32))), image, factor)


def saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with the grey image."""
    return blend(luma(image), image, factor)


def hue(image: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """Adds to the hue of HSV; `turn` 1 is all the way round."""
    hsv = tf.image.rgb_to_hsv(tf.cast(image, tf.float32) / 255)
    turned = tf.concat([tf.math.floormod(hsv[..., :1] + turn, 1.0), hsv[..., 1:]], -1)
    return round_to_uint8(tf.image.hsv_to_rgb(turned) * 255)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blends with a smoothed image (3 x 3, the middle weighs 5); the border stays as it is."""
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    whole = tf.cast(image, tf.float32)[None]
    smooth = tf.nn.depthwise_conv2d(whole, kernel, [1, 1, 1, 1], "SAME")[0]
    height, width = tf.unstack(tf.shape(image)[:2])
    rows, columns = tf.range(height)[:, None, None], tf.range(width)[None, :, None]
    inside = (rows > 0) & (rows < height - 1) & (columns > 0) & (columns < width - 1)
    return blend(tf.where(inside, round_to_uint8(smooth), image), image, factor)


def solarize(image: tf.Tensor, threshold: tf.Tensor | float) -> tf.Tensor:
    """Inverts what is at least the threshold."""
    return tf.where(tf.cast(image, tf.float32) >= threshold, 255 - image, image)


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keeps the upper `bits`, int32 [], of each number."""
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each colour to 0 to 255; one that is constant stays."""
    numbers = tf.cast(image, tf.float32)
    low = tf.reduce_min(numbers, [0, 1])
    high = tf.reduce_max(numbers, [0, 1])
    stretched = (numbers - low) * (255 / tf.maximum(high - low, 1))
    return tf.where(high > low, round_to_uint8(stretched), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Spreads the histogram of each colour evenly."""

    def one(channel: tf.Tensor) -> tf.Tensor:
        places = tf.cast(channel, tf.int32)
        counts = tf.math.bincount(tf.reshape(places, [-1]), minlength=256, maxlength=256)
        last = tf.gather(counts, tf.reduce_max(places))
        # As in Pillow: pixels of the brightest shade do not count for the size of a step.
        step = (tf.reduce_sum(counts) - last) // 255
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
        table = tf.where(step > 0, tf.minimum(table, 255), tf.range(256))
        return tf.cast(tf.gather(table, places), tf.uint8)

    return tf.stack([one(image[..., number]) for number in range(3)], -1)


def blur(image: tf.Tensor, sigma: tf.Tensor, radius: int) -> tf.Tensor:
    """Blurs with a Gaussian of standard deviation `sigma`, in pixels, cut off at `radius`.

    Beyond the edge the image is mirrored (the edge not repeated), in a smaller image its edge
    pixels are repeated.
    """
    places = tf.range(-radius, radius + 1)
    weights = tf.exp(-0.5 * (tf.cast(places, tf.float32) / sigma) ** 2)
    weights = tf.tile((weights / tf.reduce_sum(weights))[:, None, None, None], [1, 1, 3, 1])
    blurred = tf.cast(image, tf.float32)
    for axis in (0, 1):
        side = tf.shape(image)[axis]
        index = tf.range(-radius, side + radius)
        index = tf.abs(index)  # mirrors what lies before the first pixel
        index = tf.clip_by_value(side - 1 - tf.abs(side - 1 - index), 0, side - 1)
        padded = tf.gather(blurred, index, axis=axis)
        kernel = weights if axis == 0 else tf.transpose(weights, [1, 0, 2, 3])
        blurred = tf.nn.depthwise_conv2d(padded[None], kernel, [1, 1, 1, 1], "VALID")[0]
    return round_to_uint8(blurred)


def affine(
    image: tf.Tensor,
    matrix: tf.Tensor,
    shift: tf.Tensor,
    interpolation: str,
    fill: tuple[int, int, int],
) -> tf.Tensor:
    """Moves pixels: the result at p is the image at matrix @ (p - middle) + middle + shift.

    `matrix` [2, 2] and `shift` [2] (pixels) are float32, for (x, y); `interpolation` is "nearest"
    or "bilinear", `fill` the colour of what comes from outside.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    middle = tf.cast(tf.stack([width, height]) - 1, tf.float32) / 2
    # The operation turns about the corner; the offset moves the fixed point to the middle.
    offset = middle + shift - tf.linalg.matvec(matrix, middle)
    rows = tf.concat([matrix, offset[:, None]], 1)
    color = tf.constant(fill, tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        # Outside is filled with 0, so the fill colour is subtracted before and added again.
        images=(tf.cast(image, tf.float32) - color)[None],
        transforms=tf.concat([tf.reshape(rows, [1, 6]), tf.zeros([1, 2])], 1),
        output_shape=tf.stack([height, width]),
        interpolation=interpolation.upper(),
        fill_mode="CONSTANT",
        fill_value=0.0,
    )[0]
    return tf.ensure_shape(round_to_uint8(moved + color), image.shape)
