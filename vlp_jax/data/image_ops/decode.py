"""Decodes an encoded image to upright uint8 RGB: all of it, or the part that a crop needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.image_ops import upright
from vlp_jax.data.image_ops.fields import IMAGE, ImageField, check_count
from vlp_jax.data.image_ops.upright import MAX_PIXELS
from vlp_jax.data.lazy_tensorflow import Example, Op, tf

# ratio, begin, extent, how: see `part_decoder`
Part = tuple["tf.Tensor", "tf.Tensor", "tf.Tensor", "tf.Tensor"]
Place = Callable[["tf.Tensor", int | None], Part]
_Decoded = Any  # a tensor, or a pair of tensors: the image, and `how`

# Start of image, then an APP0 segment of 16 bytes (JFIF 1.02); and the marker of the quantization
# tables, before which an Exif segment should stand (Exif 2.32, 4.5.4).
_JFIF_HEADER, _QUANTIZATION = b"\xff\xd8\xff\xe0\x00\x10", b"\xff\xdb"
_TABLES = 1024  # bytes of a JPEG in which all tables of a picture with three channels end
_METADATA = r"(?s)\C*(?:Exif\x00\x00|http://ns\.adobe\.com/xap)\C*"  # how an APP1 segment begins
_HEAD = 2**18  # bytes of a JPEG that are searched for metadata: 4 of the longest segments
_DCT = "INTEGER_ACCURATE"


def decode_image(
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    field: str = IMAGE,
    into: str | None = None,
) -> Op:
    """Decodes an image from JPEG, PNG, WebP, GIF or BMP to upright RGB, uint8 [h, w, 3].

    Grey becomes RGB, CMYK is converted, what is transparent is composited on white, of 16 bits the
    upper 8 are kept, of an animation the first frame; and the image is turned as its orientation
    says. All as `upright.upright_rgb` does it by Pillow.

    Args:
      min_side: None decodes all pixels. A number lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its
        size (by the scaled inverse DCT, which averages pixels) as long as its shorter side keeps
        at least that many pixels: several times faster for photographs. Where a crop follows, it
        is the shorter side of what is cut out that keeps them.
      max_pixels: of a larger image nothing is decoded; it fails as "image too large".
      field, into: the file, and the field of the pixels; None replaces the file.
    """
    _check(min_side, max_pixels)
    images = ImageField("decode_image", field, into)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        encoded = images.encoded(example)

        def jpeg(orientation: tf.Tensor | None) -> tf.Tensor:
            return _whole_jpeg(encoded, orientation, min_side, max_pixels)

        image = _by_format(encoded, max_pixels, jpeg, lambda image: image)
        return images.write(example, tf.ensure_shape(image, [None, None, 3]))

    return apply


def part_decoder(
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    field: str = IMAGE,
    into: str | None = None,
) -> Callable[[Example, Place], tuple[tf.Tensor, tf.Tensor]]:
    """Decodes only the part of an image that a crop needs; arguments as `decode_image`.

    Returns:
      A function of an example and of `place`, which chooses the part. `place` gets the upright
      height and width, int32 [2], and `min_side`; it returns the ratio (1, 2, 4 or 8) by which a
      JPEG is scaled down; begin and extent, int32 [2] each, of the part in the scaled image; and
      `how`, a float32 tensor of its own. The function returns the part, uint8 [h, w, 3], and `how`.
      A JPEG is read down to the last row of the part: that the file is cut short below is not
      noticed.
    """
    _check(min_side, max_pixels)
    images = ImageField("decode_image", field, into)

    def decode(example: Example, place: Place) -> tuple[tf.Tensor, tf.Tensor]:
        encoded = images.encoded(example)

        def part_of(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            _, begin, extent, how = place(tf.shape(image)[:2], None)
            return cut(image, begin, extent), how

        def jpeg(orientation: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
            return _part_of_jpeg(encoded, orientation, place, min_side, max_pixels)

        image, how = _by_format(encoded, max_pixels, jpeg, part_of)
        return tf.ensure_shape(image, [None, None, 3]), how

    return decode


def cut(image: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    """Cuts out a rectangle of an image [h, w, 3]; `begin` and `extent` are int32 [2] each."""
    return tf.slice(image, tf.concat([begin, [0]], 0), tf.concat([extent, [3]], 0))


def ratio_keeping(shortest: tf.Tensor, min_side: int | None) -> tf.Tensor:
    """The largest of 1, 2, 4 and 8 by which a side can be divided and keep `min_side` pixels."""
    if min_side is None:
        return tf.constant(1)
    halvings = sum(tf.cast(shortest // ratio >= min_side, tf.int32) for ratio in (2, 4, 8))
    return tf.bitwise.left_shift(1, halvings)


def _by_format(
    encoded: tf.Tensor,
    max_pixels: int,
    jpeg: Callable[[tf.Tensor | None], _Decoded],
    whole: Callable[[tf.Tensor], _Decoded],
) -> _Decoded:
    """Applies `jpeg` (to its orientation, or None) or `whole` (to upright pixels), by format.

    To decide, and to look for an orientation, costs as much as to decode a small file. Most files
    that have none say so at once, and are decoded without another question: after a JFIF header
    come the quantization tables, and no APP1 segment within reach of the other tables.
    """
    substr = tf.strings.substr
    head = tf.strings.join([substr(encoded, 0, _TABLES), b"\0" * 22])  # substr fails beyond the end
    plain = (substr(head, 0, 6) == _JFIF_HEADER) & (substr(head, 20, 2) == _QUANTIZATION)

    def really_plain() -> tf.Tensor:
        metadata = tf.strings.regex_full_match(head, _METADATA)
        return ~metadata & (tf.io.extract_jpeg_shape(encoded)[2] != 4)

    def unusual() -> _Decoded:
        orientation = tf.cond(tf.io.is_jpeg(encoded), lambda: _jpeg_orientation(encoded), lambda: 0)
        return tf.cond(
            orientation > 0,
            lambda: jpeg(orientation),
            lambda: whole(_whole_decoder(max_pixels)(encoded)),
        )

    # The bytes 0 to 5 and 20 to 21 are compared first, because searching costs more.
    plain = tf.cond(plain, really_plain, lambda: plain)
    return tf.cond(plain, lambda: jpeg(None), unusual)


def _check(min_side: int | None, max_pixels: int) -> None:
    if min_side is not None:
        check_count("decode_image", min_side, "min_side")
    check_count("decode_image", max_pixels, "max_pixels", "pixels an image")


@dataclass(frozen=True)
class _Turn:
    """Turns a stored image upright by its Exif orientation, int32 []; None for no turn."""

    orientation: tf.Tensor | None

    def _flags(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Whether rows and columns are exchanged, and, after that, whether each is reversed."""
        upside_down = tf.reduce_any(self.orientation == [3, 4, 7, 8])
        mirrored = tf.reduce_any(self.orientation == [2, 3, 6, 7])
        return self.orientation >= 5, upside_down, mirrored

    def image(self, stored: tf.Tensor) -> tf.Tensor:
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
        return tf.where(self.orientation >= 5, stored[::-1], stored)

    def stored_window(self, sides: tf.Tensor, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
        """Finds (y, x, height, width), in the stored image, of a rectangle of the upright image."""
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
    sides = tf.io.extract_jpeg_shape(encoded)[:2]
    # Before decoding: a header may promise more pixels than there is memory.
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
    if min_side is None:
        return decode(1)
    # `ratio` of the decoder is an attribute of the operation, so each ratio is a branch.
    number = tf.reduce_sum(tf.cast(ratio > [1, 2, 4], tf.int32))
    return tf.switch_case(number, [lambda r=r: decode(r) for r in (1, 2, 4, 8)])


def _require_size(encoded: tf.Tensor, sides: tf.Tensor, max_pixels: int) -> tf.Tensor:
    fits = tf.reduce_prod(tf.cast(sides, tf.int64)) <= max_pixels
    return faults.require(encoded, fits, faults.TOO_LARGE, f"more than {max_pixels} pixels")


def _jpeg_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Calls `upright.jpeg_orientation` in the graph; int32 []."""

    def read(head: bytes) -> np.ndarray:
        return np.array(upright.jpeg_orientation(head), np.int32)

    head = tf.strings.substr(encoded, 0, _HEAD)
    return tf.ensure_shape(tf.numpy_function(read, [head], tf.int32, stateful=False), [])


@cache
def _whole_decoder(max_pixels: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """`_decode_whole` as a function of TensorFlow, traced once for all pipelines of the process."""
    return tf.function(
        lambda encoded: _decode_whole(encoded, max_pixels),
        input_signature=[tf.TensorSpec([], tf.string)],
        autograph=False,
    )


def _decode_whole(encoded: tf.Tensor, max_pixels: int) -> tf.Tensor:
    """The upright pixels of a file that is not left to TensorFlow's JPEG decoder."""

    def read(data: bytes) -> tuple[np.ndarray, bytes]:
        try:
            return upright.read(data, max_pixels), b""
        except faults.BadExample as bad:
            return np.zeros([0, 0, 3], np.uint8), faults.marked(bad.reason, bad.detail)

    pixels, fault = tf.numpy_function(read, [encoded], [tf.uint8, tf.string], stateful=False)
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    return faults.require_marked(pixels, tf.ensure_shape(fault, []) == b"", fault)
