"""From an encoded `image` to upright uint8 RGB: all of it, or the part that a crop needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.image_ops.checks import check_count, encoded_image
from vlp_jax.data.image_ops.headers import exif_orientation, prepare
from vlp_jax.data.lazy_tensorflow import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Example, Op

    # ratio, begin, extent, how: see `part_decoder`
    Part = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]
    Place = Callable[[tf.Tensor, int | None], Part]

# Start of image, then an APP0 segment of 16 bytes (JFIF 1.02); and the marker of the quantization
# tables, before which an Exif segment stands (Exif 2.32, 4.5.4).
_JFIF_HEADER, _QUANTIZATION = b"\xff\xd8\xff\xe0\x00\x10", b"\xff\xdb"
_HEAD = 65536  # where in a JPEG file an Exif segment may begin; a segment is no longer than this
_DCT = "INTEGER_ACCURATE"
MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: where Pillow raises DecompressionBombError


def decode_image(min_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Op:
    """Decodes `image` from JPEG, PNG, WebP, GIF or BMP to upright RGB, uint8 [h, w, 3].

    Grey becomes RGB, CMYK is converted, what is transparent is composited on white, of 16 bits the
    upper 8 are kept, of an animation the first frame; and the image is turned as its Exif
    orientation says (JPEG, PNG, WebP).

    Args:
      min_side: None decodes all pixels. A number lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its
        size (by the scaled inverse DCT, which averages pixels) as long as its shorter side keeps
        at least that many pixels: several times faster for photographs. Where a crop follows, it
        is the shorter side of what is cut out that keeps them.
      max_pixels: of a larger image nothing is decoded; it fails as "image too large".
    """
    _check(min_side, max_pixels)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        tf = import_tensorflow()
        encoded = encoded_image(example, "decode_image")

        def jpeg(orientation: tf.Tensor | None) -> tf.Tensor:
            return _whole_jpeg(encoded, orientation, min_side, max_pixels)

        image = _by_format(encoded, jpeg, lambda: _decode_other(encoded, max_pixels))
        return {**example, "image": tf.ensure_shape(image, [None, None, 3])}

    return apply


def part_decoder(
    min_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> Callable[[Example, Place], tuple[tf.Tensor, tf.Tensor]]:
    """Decodes only the part of `image` that a crop needs; arguments as `decode_image`.

    Returns:
      A function of an example and of `place`, which chooses the part. `place` gets the upright
      height and width, int32 [2], and `min_side`; it returns the ratio (1, 2, 4 or 8) by which a
      JPEG is scaled down; begin and extent, int32 [2] each, of the part in the scaled image; and
      `how`, a float32 tensor of its own. The function returns the part, uint8 [h, w, 3], and `how`.
      A JPEG is read down to the last row of the part: that the file is cut short below is not
      noticed.
    """
    _check(min_side, max_pixels)

    def decode(example: Example, place: Place) -> tuple[tf.Tensor, tf.Tensor]:
        tf = import_tensorflow()
        encoded = encoded_image(example, "decode_image")

        def other() -> tuple[tf.Tensor, tf.Tensor]:
            image = _decode_other(encoded, max_pixels)
            _, begin, extent, how = place(tf.shape(image)[:2], None)
            return cut(image, begin, extent), how

        def jpeg(orientation: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
            return _part_of_jpeg(encoded, orientation, place, min_side, max_pixels)

        image, how = _by_format(encoded, jpeg, other)
        return tf.ensure_shape(image, [None, None, 3]), how

    return decode


def cut(image: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    """The rectangle of an image [h, w, 3] at `begin`, of size `extent`, int32 [2] each."""
    tf = import_tensorflow()
    return tf.slice(image, tf.concat([begin, [0]], 0), tf.concat([extent, [3]], 0))


def ratio_keeping(shortest: tf.Tensor, min_side: int | None) -> tf.Tensor:
    """The largest of 1, 2, 4 and 8 by which a side can be divided and keep `min_side` pixels."""
    tf = import_tensorflow()
    if min_side is None:
        return tf.constant(1)
    halvings = sum(tf.cast(shortest // ratio >= min_side, tf.int32) for ratio in (2, 4, 8))
    return tf.bitwise.left_shift(1, halvings)


def _by_format(
    encoded: tf.Tensor,
    jpeg: Callable[[tf.Tensor | None], tf.Tensor | tuple[tf.Tensor, ...]],
    other: Callable[[], tf.Tensor | tuple[tf.Tensor, ...]],
) -> tf.Tensor | tuple[tf.Tensor, ...]:
    """What one of two functions makes of a file; `jpeg` gets the orientation, None if it has none.

    To decide, and to search a file for Exif, costs as much as to decode a small one. Most that hold
    none say so at once, and are decoded without another question: after a JFIF header come the
    quantization tables.
    """
    tf = import_tensorflow()
    substr = tf.strings.substr
    head = tf.strings.join([substr(encoded, 0, 22), b"\0" * 22])  # substr fails beyond the end
    plain = (substr(head, 0, 6) == _JFIF_HEADER) & (substr(head, 20, 2) == _QUANTIZATION)

    def unusual() -> tf.Tensor | tuple[tf.Tensor, ...]:
        searched = lambda: jpeg(_jpeg_orientation(encoded))  # noqa: E731
        return tf.cond(tf.io.is_jpeg(encoded), searched, other)

    return tf.cond(plain, lambda: jpeg(None), unusual)


def _check(min_side: int | None, max_pixels: int) -> None:
    if min_side is not None:
        check_count("decode_image", min_side, "min_side")
    check_count("decode_image", max_pixels, "max_pixels", "pixels an image")


@dataclass(frozen=True)
class _Turn:
    """How a stored image becomes upright, by its Exif orientation, int32 []; None if it is."""

    orientation: tf.Tensor | None

    def _flags(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Whether rows and columns are exchanged, and, after that, whether each is reversed."""
        tf = import_tensorflow()
        upside_down = tf.reduce_any(self.orientation == [3, 4, 7, 8])
        mirrored = tf.reduce_any(self.orientation == [2, 3, 6, 7])
        return self.orientation >= 5, upside_down, mirrored

    def image(self, stored: tf.Tensor) -> tf.Tensor:
        tf = import_tensorflow()
        if self.orientation is None:
            return stored

        def turn() -> tf.Tensor:
            exchanged, upside_down, mirrored = self._flags()
            image = tf.cond(exchanged, lambda: tf.transpose(stored, [1, 0, 2]), lambda: stored)
            return tf.raw_ops.Reverse(tensor=image, dims=tf.stack([upside_down, mirrored, False]))

        return tf.cond(self.orientation > 1, turn, lambda: stored)

    def sides(self, stored: tf.Tensor) -> tf.Tensor:
        if self.orientation is None:
            return stored
        return import_tensorflow().where(self.orientation >= 5, stored[::-1], stored)

    def stored_window(self, sides: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
        """(y, x, height, width) in the stored image of a rectangle of the upright one.

        `sides` are those of the upright image.
        """
        tf = import_tensorflow()
        whole = tf.concat([begin, extent], 0)
        if self.orientation is None:
            return whole

        def turn() -> tf.Tensor:
            exchanged, upside_down, mirrored = self._flags()
            reverse = tf.stack([upside_down, mirrored])
            start = tf.where(reverse, sides - begin - extent, begin)
            window = tf.stack([start, extent])
            return tf.reshape(tf.where(exchanged, window[:, ::-1], window), [4])

        return tf.cond(self.orientation > 1, turn, lambda: whole)


def _whole_jpeg(
    encoded: tf.Tensor, orientation: tf.Tensor | None, min_side: int | None, max_pixels: int
) -> tf.Tensor:
    tf = import_tensorflow()
    sides = tf.io.extract_jpeg_shape(encoded)[:2]
    encoded = _require_size(encoded, sides, max_pixels)

    def decode(ratio: int) -> tf.Tensor:
        return tf.io.decode_jpeg(encoded, channels=3, ratio=ratio, dct_method=_DCT)

    image = _at_ratio(decode, ratio_keeping(tf.reduce_min(sides), min_side), min_side)
    return _Turn(orientation).image(image)


def _part_of_jpeg(
    encoded: tf.Tensor,
    orientation: tf.Tensor | None,
    place: Place,
    min_side: int | None,
    max_pixels: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    tf = import_tensorflow()
    stored = tf.io.extract_jpeg_shape(encoded)[:2]
    turn = _Turn(orientation)
    sides = turn.sides(stored)
    ratio, begin, extent, how = place(sides, min_side)
    window = turn.stored_window(-(-sides // ratio), begin, extent)
    encoded = _require_size(encoded, stored, max_pixels)

    def decode(ratio: int) -> tf.Tensor:
        return tf.io.decode_and_crop_jpeg(encoded, window, channels=3, ratio=ratio, dct_method=_DCT)

    return turn.image(_at_ratio(decode, ratio, min_side)), how


def _at_ratio(
    decode: Callable[[int], tf.Tensor], ratio: tf.Tensor, min_side: int | None
) -> tf.Tensor:
    tf = import_tensorflow()
    if min_side is None:
        return decode(1)
    number = tf.reduce_sum(tf.cast(ratio > [1, 2, 4], tf.int32))
    return tf.switch_case(number, [lambda r=r: decode(r) for r in (1, 2, 4, 8)])


def _require_size(encoded: tf.Tensor, sides: tf.Tensor, max_pixels: int) -> tf.Tensor:
    tf = import_tensorflow()
    fits = tf.reduce_prod(tf.cast(sides, tf.int64)) <= max_pixels
    return faults.require(encoded, fits, faults.TOO_LARGE, f"more than {max_pixels} pixels")


def _jpeg_orientation(encoded: tf.Tensor) -> tf.Tensor:
    tf = import_tensorflow()

    def orientation_of(head: bytes) -> np.ndarray:
        return np.array(exif_orientation(head), np.int32)

    def read(head: tf.Tensor) -> tf.Tensor:
        orientation = tf.numpy_function(orientation_of, [head], tf.int32, stateful=False)
        return tf.ensure_shape(orientation, [])

    head = tf.strings.substr(encoded, 0, _HEAD)
    has_exif = tf.strings.regex_full_match(head, r"(?s)\C*Exif\x00\x00\C*")
    return tf.cond(has_exif, lambda: read(head), lambda: tf.constant(1))


def _decode_other(encoded: tf.Tensor, max_pixels: int) -> tf.Tensor:
    tf = import_tensorflow()

    def read(data: bytes) -> tuple[bytes, np.ndarray]:
        header = prepare(data, max_pixels)
        if header is None:
            return b"", np.zeros(8, np.int32)
        return header.data, header.numbers()

    data, numbers = tf.numpy_function(read, [encoded], [tf.string, tf.int32], stateful=False)
    data.set_shape([])
    numbers.set_shape([8])
    what = "neither JPEG, PNG, WebP, GIF nor BMP, or cut short"
    data = faults.require(data, numbers[0] > 0, faults.UNDECODABLE, what)
    data = _require_size(data, numbers[:2], max_pixels)
    image = tf.io.decode_image(data, channels=0, expand_animations=False)
    image.set_shape([None, None, None])
    image = _on_white(image, data, numbers[3:6])
    sides = tf.shape(image)[:2]
    top, left = numbers[6], numbers[7]

    def on_canvas() -> tf.Tensor:
        after = tf.maximum(numbers[:2] - sides - numbers[6:], 0)
        pads = tf.stack([tf.stack([top, after[0]]), tf.stack([left, after[1]]), [0, 0]])
        return tf.pad(image, pads, constant_values=tf.constant(255, tf.uint8))

    image = tf.cond(tf.reduce_all(sides == numbers[:2]), lambda: image, on_canvas)
    return _Turn(numbers[2]).image(image)


def _on_white(image: tf.Tensor, data: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """RGB of an image of 1 to 4 channels, on white where it or the colour `key` is transparent."""
    tf = import_tensorflow()
    channels = tf.shape(image)[2]
    has_fourth = (channels == 2) | (channels == 4)
    color = image[:, :, : channels - tf.cast(has_fourth, tf.int32)]
    # The fourth byte of a BMP pixel is padding, and commonly zero.
    has_alpha = has_fourth & (tf.strings.substr(data, 0, 2) != b"BM")

    def blended() -> tf.Tensor:
        alpha = tf.cast(image[:, :, channels - 1 :], tf.float32) / 255
        blend = tf.cast(color, tf.float32) * alpha + 255 * (1 - alpha)
        return tf.cast(tf.round(blend), tf.uint8)

    color = tf.cond(has_alpha, blended, lambda: color)
    color = tf.broadcast_to(color, tf.concat([tf.shape(image)[:2], [3]], 0))

    def without_key() -> tf.Tensor:
        hidden = tf.reduce_all(tf.cast(color, tf.int32) == key, axis=2, keepdims=True)
        return tf.where(hidden, tf.constant(255, tf.uint8), color)

    return tf.cond(key[0] >= 0, without_key, lambda: color)
