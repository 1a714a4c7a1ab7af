"""Resampling of a part of an image to a square of uint8, with the result of Pillow's resize.

`tf.raw_ops.ScaleAndTranslate` computes it, but its pass along columns handles the three numbers of
one pixel at a time, and its pass along rows hands every few rows to a pool of threads. So each pass
is a call of its own whose "pixels" are whole rows, on the image and then on its transpose, which
takes less than half of the time (docs/data_images.md). Float32 throughout, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlp_jax.data.image_ops.fields import check_count
from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.errors import UserError

# Kernels of tf.raw_ops.ScaleAndTranslate with their radius in pixels; "keyscubic" is Keys (1981)
# with a = -0.5, as in Pillow.
_KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic", "lanczos3": "lanczos3"}
_RADII = {"bilinear": 1, "bicubic": 2, "lanczos3": 3}
_MAX_BETWEEN = 2**22  # pixels between the two passes, 48 MiB


@dataclass(frozen=True)
class Resampler:
    """Resizes images to uint8 [size, size, 3]; `op` names the operation in messages.

    Attributes:
      method: "bilinear", "bicubic" or "lanczos3".
      antialias: whether the kernel widens when the image shrinks, as Pillow's does.
    """

    op: str
    size: int
    method: str
    antialias: bool

    def __post_init__(self) -> None:
        check_count(self.op, self.size, "size")
        if self.method not in _KERNELS:
            known = ", ".join(_KERNELS)
            raise UserError(f"{self.op}: method {self.method!r} is not one of {known}")

    def fit(self, image: tf.Tensor) -> tf.Tensor:
        """Resizes all of an image, uint8 [h, w, 3], whatever its aspect ratio."""
        size = self.size
        sides = tf.shape(image)[:2]
        same = tf.reduce_all(sides == size)

        def two_passes() -> tf.Tensor:
            return self._two_passes(image, tf.cast(size / sides, tf.float32), tf.zeros([2]))

        if self.method != "bilinear":
            return self._static(tf.cond(same, lambda: image, two_passes))

        # Where the kernel is not widened ResizeBilinear computes the same, and faster than here.
        def enlarge() -> tf.Tensor:
            resized = tf.raw_ops.ResizeBilinear(
                images=tf.cast(image, tf.float32)[None], size=[size, size], half_pixel_centers=True
            )
            return self._to_uint8(resized[0])

        if not self.antialias:
            return self._static(tf.cond(same, lambda: image, enlarge))
        case = tf.where(same, 0, 1 + tf.cast(tf.reduce_any(sides > size), tf.int32))
        return self._static(tf.switch_case(case, [lambda: image, enlarge, two_passes]))

    def reach(self, scale: tf.Tensor) -> tf.Tensor:
        """How many pixels beside its centre, in the image, a pixel of the result depends on."""
        widened = tf.maximum(1 / scale, 1.0) if self.antialias else tf.ones_like(scale)
        return _RADII[self.method] * widened

    def warp(self, image: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor) -> tf.Tensor:
        """Scales and then shifts an image, uint8 [h, w, 3]; what lies outside of it has no weight.

        `scale` is pixels of the result in a pixel of the image, `translation` in pixels of the
        result (whole numbers where the scale is 1): float32 [2] each, for y and x.
        """

        def shift() -> tf.Tensor:
            begin = tf.concat([-tf.cast(tf.round(translation), tf.int32), [0]], 0)
            return tf.slice(image, begin, [self.size, self.size, 3])

        unscaled = tf.reduce_all(scale == 1)
        warped = tf.cond(unscaled, shift, lambda: self._two_passes(image, scale, translation))
        return self._static(warped)

    def _two_passes(self, image: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor) -> tf.Tensor:
        size = self.size
        # Between the passes lie `size` rows: of a flat image, many more pixels than it has. So the
        # passes are exchanged by transposing the image and the result.
        height, width = tf.unstack(tf.shape(image)[:2])
        flat = (width > _MAX_BETWEEN // size) & (width > height)

        def turned(pixels: tf.Tensor) -> tf.Tensor:
            return tf.cond(flat, lambda: tf.transpose(pixels, [1, 0, 2]), lambda: pixels)

        image = turned(image)
        scale = tf.where(flat, scale[::-1], scale)
        translation = tf.where(flat, translation[::-1], translation)
        # All numbers of a row become the "channels" of one pixel, in one call along the height.
        rows = tf.reshape(image, [1, 1, tf.shape(image)[0], -1])
        rows = self._resample(rows, scale[0], translation[0])
        columns = tf.transpose(tf.reshape(rows, [size, -1]))
        columns = tf.reshape(columns, [1, 1, -1, 3 * size])
        columns = self._to_uint8(self._resample(columns, scale[1], translation[1]))
        return turned(tf.reshape(tf.transpose(tf.reshape(columns, [-1, size])), [size, size, 3]))

    def _resample(self, rows: tf.Tensor, scale: tf.Tensor, translation: tf.Tensor) -> tf.Tensor:
        """Resamples the third axis: [1, 1, rows, n] to float32 [1, 1, size, n]."""
        return tf.raw_ops.ScaleAndTranslate(
            images=rows,
            size=[1, self.size],
            scale=tf.stack([1.0, tf.cast(scale, tf.float32)]),
            translation=tf.stack([0.0, translation]),
            kernel_type=_KERNELS[self.method],
            antialias=self.antialias,
        )

    def _to_uint8(self, image: tf.Tensor) -> tf.Tensor:
        # Conversion to an integer truncates, which after the addition of a half is rounding. A
        # bilinear result is a mean with positive weights: it cannot leave the range.
        image = image + 0.5
        if self.method != "bilinear":
            image = tf.clip_by_value(image, 0, 255)
        return tf.cast(image, tf.uint8)

    def _static(self, image: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(image, [self.size, self.size, 3])


def shortest_to_size(
    sides: tf.Tensor, resampler: Resampler, offset: Callable[[tf.Tensor], tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Places a square in an image whose shorter side is resized to the side of the square.

    `offset` gets how many rows and columns of the resized image are too many, int64 [2], and
    returns how many come off in front, float64 [2].

    Returns:
      begin and extent, int32 [2] each, of the part of the image that the square depends on; and
      scale and translation, as `Resampler.warp` takes them, that make the square of that part.
    """
    size = resampler.size
    # A long and thin image has more rows or columns, resized, than int32 and float32 count.
    long = tf.cast(sides, tf.int64)
    resized = long * size // tf.reduce_min(long)
    scale = tf.cast(resized / long, tf.float64)
    front = offset(resized - size)
    reach = resampler.reach(scale)
    # One more on each side, because rounding may move a position to the next pixel.
    begin = tf.maximum(tf.cast(tf.floor(front / scale - reach), tf.int32) - 1, 0)
    end = tf.cast(tf.math.ceil((front + size) / scale + reach), tf.int32) + 1
    extent = tf.minimum(end, sides) - begin
    translation = scale * tf.cast(begin, tf.float64) - front
    return begin, extent, tf.cast(scale, tf.float32), tf.cast(translation, tf.float32)
