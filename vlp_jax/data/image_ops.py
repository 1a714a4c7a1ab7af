"""Image operations on an example's `image`, inside a tf.data graph.

Images are uint8 RGB, [height, width, 3]. Each public function checks its settings and returns the
operation, a function (example, seed) -> example; `vlp_jax.data.ops` lists them for configs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Example, Op

# Kernels of tf.raw_ops.ScaleAndTranslate; "keyscubic" is Keys (1981) with a = -0.5, as in Pillow.
_KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic", "lanczos3": "lanczos3"}
# Start of image, then an APP0 segment of 16 bytes (JFIF 1.02); and the marker of the quantization
# tables, before which an Exif segment stands (Exif 2.32, 4.5.4).
_JFIF_HEADER, _QUANTIZATION = b"\xff\xd8\xff\xe0\x00\x10", b"\xff\xdb"
_HEAD = 65536  # where in a JPEG file an Exif segment may begin; a segment is no longer than this


def decode_image(min_side: int | None = None) -> Op:
    """Decodes `image` from JPEG, PNG, WebP, GIF (its first frame) or BMP to upright RGB.

    Grey becomes RGB, CMYK is converted, alpha is composited on white, 16 bits become 8, and a JPEG
    is turned as its Exif orientation says.

    Args:
      min_side: None decodes all pixels. A number lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its
        size (by the scaled inverse DCT, which averages pixels) as long as its shorter side keeps
        at least that many pixels: several times faster for photographs.
    """
    if min_side is not None:
        _check_size("decode_image", min_side, "min_side")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        tf = import_tensorflow()
        encoded = example["image"]
        if encoded.dtype != tf.string:
            raise UserError("decode_image: 'image' is decoded already; leave the operation out")
        image = tf.cond(
            tf.io.is_jpeg(encoded),
            lambda: _decode_jpeg(encoded, min_side),
            lambda: _decode_other(encoded),
        )
        return {**example, "image": tf.ensure_shape(image, [None, None, 3])}

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
    op = "random_resized_crop"
    kernel = _check_resize(op, size, method)
    if not 0 < min_scale <= max_scale <= 1:
        raise UserError(f"{op}: needs 0 < min_scale <= max_scale <= 1: {min_scale}, {max_scale}")
    if not 0 < min_ratio <= max_ratio:
        raise UserError(f"{op}: needs 0 < min_ratio <= max_ratio: {min_ratio}, {max_ratio}")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        tf = import_tensorflow()
        image = _image(example, op)
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4], tf.float32),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(min_ratio, max_ratio),
            area_range=(min_scale, max_scale),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        crop = tf.slice(image, begin, extent)
        return {**example, "image": _resize(crop, size, kernel, antialias)}

    return apply


def resize(size: int, method: str = "bicubic", antialias: bool = True) -> Op:
    """Resizes to [size, size, 3] whatever the aspect ratio; arguments as `random_resized_crop`."""
    kernel = _check_resize("resize", size, method)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        image = _image(example, "resize")
        return {**example, "image": _resize(image, size, kernel, antialias)}

    return apply


def resize_shortest_and_center_crop(
    size: int, method: str = "bicubic", antialias: bool = True
) -> Op:
    """Resizes the shorter side to `size`, and cuts the middle [size, size, 3] out.

    Sizes and offsets are rounded as in torchvision's Resize and CenterCrop. Arguments are those of
    `random_resized_crop`.
    """
    op = "resize_shortest_and_center_crop"
    kernel = _check_resize(op, size, method)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        tf = import_tensorflow()

        def offset(spare: tf.Tensor) -> tf.Tensor:
            # Rounds half to even, as Python does in torchvision.
            return tf.round(tf.cast(spare, tf.float32) / 2)

        image = _resize_shortest_and_crop(_image(example, op), size, kernel, antialias, offset)
        return {**example, "image": image}

    return apply


def resize_shortest_and_random_crop(
    size: int, method: str = "bicubic", antialias: bool = True
) -> Op:
    """Resizes the shorter side to `size`, and cuts a square [size, size, 3] out anywhere.

    "A random square crop from resized images" is CLIP's only augmentation (Radford et al. 2021,
    2.3). Arguments are those of `random_resized_crop`.
    """
    op = "resize_shortest_and_random_crop"
    kernel = _check_resize(op, size, method)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        tf = import_tensorflow()

        def offset(spare: tf.Tensor) -> tf.Tensor:
            places = tf.cast(spare + 1, tf.float32)
            return tf.floor(tf.random.stateless_uniform([2], seed) * places)

        image = _resize_shortest_and_crop(_image(example, op), size, kernel, antialias, offset)
        return {**example, "image": image}

    return apply


def flip_left_right(unless_text: str | None = r"\b(left|right)\b") -> Op:
    """Mirrors half of the images, but none whose `text` the pattern occurs in.

    Args:
      unless_text: a regular expression (RE2), matched anywhere in `text` and in any case; None
        mirrors half of all images.
    """
    pattern = None
    if unless_text is not None:
        tf = import_tensorflow()
        # \C is any byte: a dot would stop at text that is not valid UTF-8.
        pattern = rf"(?is)\C*(?:{unless_text})\C*"
        try:
            tf.strings.regex_full_match("", pattern)
        except tf.errors.InvalidArgumentError:
            reason = f"{unless_text!r} is not a regular expression of RE2"
            raise UserError(f"flip_left_right: unless_text={reason}") from None

    def apply(example: Example, seed: tf.Tensor) -> Example:
        tf = import_tensorflow()
        image = _image(example, "flip_left_right")
        flip = tf.random.stateless_uniform([], seed) < 0.5
        if pattern is not None:
            if "text" not in example or example["text"].dtype != tf.string:
                raise UserError(
                    "flip_left_right: there is no string 'text' to match unless_text with; put "
                    "choose_text before it, or set unless_text to None"
                )
            flip &= ~tf.strings.regex_full_match(example["text"], pattern)
        flipped = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
        return {**example, "image": tf.ensure_shape(flipped, image.shape)}

    return apply


def exif_orientation(head: bytes) -> int:
    """The orientation, 1 to 8, that the Exif segment of a JPEG gives; 1 if it gives none.

    Args:
      head: the beginning of the file.

    Source: Exif 2.32, sections 4.5 and 4.6 (TIFF tag 0x0112 in the zeroth IFD).
    """
    place = 2
    while place + 4 <= len(head) and head[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, place + 1)
        if marker == 0xDA:
            break
        if marker == 0xE1 and head[place + 4 : place + 10] == b"Exif\0\0":
            return _tiff_orientation(head[place + 10 : place + 2 + length])
        place += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    for start in range(directory + 2, min(directory + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start)
        if (tag, kind) == (0x0112, 3):
            return value if 1 <= value <= 8 else 1
    return 1


def _decode_jpeg(encoded: tf.Tensor, min_side: int | None) -> tf.Tensor:
    tf = import_tensorflow()

    def decode(ratio: int) -> tf.Tensor:
        return tf.io.decode_jpeg(encoded, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE")

    if min_side is None:
        image = decode(1)
    else:
        shortest = tf.reduce_min(tf.io.extract_jpeg_shape(encoded)[:2])
        halvings = sum(tf.cast(shortest // ratio >= min_side, tf.int32) for ratio in (2, 4, 8))
        branches = [lambda ratio=ratio: decode(ratio) for ratio in (1, 2, 4, 8)]
        image = tf.switch_case(halvings, branches)
    substr = tf.strings.substr
    # To search a file for Exif costs as much as to decode a small one. Most that hold none say so
    # at once: after a JFIF header come the quantization tables.
    plain = (substr(encoded, 0, 6) == _JFIF_HEADER) & (substr(encoded, 20, 2) == _QUANTIZATION)

    def turned() -> tf.Tensor:
        head = substr(encoded, 0, _HEAD)
        has_exif = tf.strings.regex_full_match(head, r"(?s)\C*Exif\x00\x00\C*")
        return tf.cond(has_exif, lambda: _upright(image, head), lambda: image)

    return tf.cond(plain, lambda: image, turned)


def _upright(image: tf.Tensor, head: tf.Tensor) -> tf.Tensor:
    tf = import_tensorflow()

    def orientation_of(head: bytes) -> np.ndarray:
        return np.array(exif_orientation(head), np.int32)

    orientation = tf.numpy_function(orientation_of, [head], tf.int32, stateful=False)
    orientation.set_shape([])
    turned = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    mirrored = tf.reduce_any(orientation == [2, 3, 6, 7])
    upside_down = tf.reduce_any(orientation == [3, 4, 7, 8])
    return tf.raw_ops.Reverse(tensor=turned, dims=tf.stack([upside_down, mirrored, False]))


def _decode_other(encoded: tf.Tensor) -> tf.Tensor:
    tf = import_tensorflow()
    image = tf.io.decode_image(encoded, channels=0, expand_animations=False)
    image.set_shape([None, None, None])
    channels = tf.shape(image)[2]
    has_fourth = (channels == 2) | (channels == 4)
    color = image[:, :, : channels - tf.cast(has_fourth, tf.int32)]
    # The fourth byte of a BMP pixel is padding, and commonly zero.
    has_alpha = has_fourth & (tf.strings.substr(encoded, 0, 2) != b"BM")

    def on_white() -> tf.Tensor:
        alpha = tf.cast(image[:, :, channels - 1 :], tf.float32) / 255
        blended = tf.cast(color, tf.float32) * alpha + 255 * (1 - alpha)
        return tf.cast(tf.round(blended), tf.uint8)

    color = tf.cond(has_alpha, on_white, lambda: color)
    return tf.broadcast_to(color, tf.concat([tf.shape(image)[:2], [3]], 0))


def _resize(image: tf.Tensor, size: int, kernel: str, antialias: bool) -> tf.Tensor:
    """Resizes uint8 [h, w, 3] to uint8 [size, size, 3] by the cheapest operation that is right."""
    tf = import_tensorflow()
    sides = tf.shape(image)[:2]
    # These compute what ScaleAndTranslate does where its kernel is not widened, 4 times as fast.
    plain = {
        "triangle": tf.raw_ops.ResizeBilinear,
        "keyscubic": tf.raw_ops.ResizeBicubic,
    }.get(kernel)

    def warp() -> tf.Tensor:
        return _warp(image, size, size / sides, [0.0, 0.0], kernel, antialias)

    def enlarge() -> tf.Tensor:
        return plain(images=image[None], size=[size, size], half_pixel_centers=True)[0]

    def resized() -> tf.Tensor:
        if plain is None:
            return _to_uint8(warp())
        if antialias:
            return _to_uint8(tf.cond(tf.reduce_all(sides <= size), enlarge, warp))
        return _to_uint8(enlarge())

    image = tf.cond(tf.reduce_all(sides == size), lambda: image, resized)
    return tf.ensure_shape(image, [size, size, 3])


def _resize_shortest_and_crop(
    image: tf.Tensor,
    size: int,
    kernel: str,
    antialias: bool,
    offset: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """`offset` gets how many rows and columns are too many, and says how many come off in front."""
    tf = import_tensorflow()
    sides = tf.shape(image)[:2]
    resized = sides * size // tf.reduce_min(sides)
    scale = tf.cast(resized / sides, tf.float32)
    shift = -offset(resized - size)
    warped = tf.cond(
        tf.reduce_all(sides == size),
        lambda: image,
        lambda: _to_uint8(_warp(image, size, scale, shift, kernel, antialias)),
    )
    return tf.ensure_shape(warped, [size, size, 3])


def _warp(
    image: tf.Tensor,
    size: int,
    scale: tf.Tensor,
    translation: tf.Tensor | list[float],
    kernel: str,
    antialias: bool,
) -> tf.Tensor:
    """Scales and then shifts [h, w, 3] into float32 [size, size, 3], in one operation."""
    tf = import_tensorflow()
    return tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=[size, size],
        scale=tf.cast(scale, tf.float32),
        translation=translation,
        kernel_type=kernel,
        antialias=antialias,
    )[0]


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    tf = import_tensorflow()
    # Conversion to an integer truncates, which after the addition of a half is rounding.
    return tf.cast(tf.clip_by_value(image + 0.5, 0, 255), tf.uint8)


def _image(example: Example, op: str) -> tf.Tensor:
    tf = import_tensorflow()
    image = example["image"]
    if image.dtype == tf.string:
        raise UserError(f"{op}: 'image' is still encoded; put decode_image before it")
    if image.dtype != tf.uint8 or image.shape.rank != 3:
        found = f"{image.dtype.name} {tuple(image.shape)}"
        raise UserError(f"{op}: 'image' must be uint8 [height, width, 3], got {found}")
    return image


def _check_size(op: str, size: int, name: str = "size") -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{op}: {name} must be a whole number of pixels above 0, got {size!r}")


def _check_resize(op: str, size: int, method: str) -> str:
    _check_size(op, size)
    if method not in _KERNELS:
        raise UserError(f"{op}: method {method!r} is not one of {', '.join(_KERNELS)}")
    return _KERNELS[method]
