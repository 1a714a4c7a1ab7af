"""Common corruptions of images at five severities (Hendrycks and Dietterich 2019, "ImageNet-C").

These are eleven of their fifteen. The others are glass blur and elastic transform, which move
pixels at random, and snow and frost, which need ImageMagick's filters and photographs of ice.

Constants come from the authors' programs (hendrycks/robustness, ImageNet-C/create_c): from
make_tinyimagenet_c.py, for 64 pixels, if the shorter side of an image is below `SMALL_SIDE`, else
from make_imagenet_c.py, for 224 pixels. Unlike their images, the results are not saved as JPEG.
Other differences are noted at the functions.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators.corruptions import constants

Image = Float[Array, "height width 3"]  # values in [0, 1]
Number = Float[Array, ""]


def gaussian_noise(key: PRNGKeyArray, image: Image, stddev: Number) -> Image:
    """Adds normal noise to every value."""
    return image + stddev * jax.random.normal(key, image.shape)


def shot_noise(key: PRNGKeyArray, image: Image, photons: Number) -> Image:
    """Draws Poisson counts of photons; white has `photons` on average."""
    return jax.random.poisson(key, image * photons) / photons


def impulse_noise(key: PRNGKeyArray, image: Image, amount: Number) -> Image:
    """Sets the share `amount` of the values to 0 or 1 (salt and pepper), each channel by itself."""
    chosen, salt = jax.random.uniform(key, (2, *image.shape))
    return jnp.where(chosen < amount, (salt < 0.5).astype(image.dtype), image)


MAX_DEGREES = 45.0  # largest angle between the camera's movement and the horizontal


def defocus_blur(key: PRNGKeyArray, image: Image, kernel: Float[Array, "side side"]) -> Image:
    """Correlates each channel with a kernel. The edge is mirrored (OpenCV's BORDER_REFLECT_101)."""
    del key
    margin = kernel.shape[0] // 2
    padded = jnp.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return jax.lax.conv_general_dilated(
        padded.transpose(2, 0, 1)[:, None], kernel[None, None], (1, 1), "VALID"
    )[:, 0].transpose(1, 2, 0)


def motion_blur(key: PRNGKeyArray, image: Image, weights: Float[Array, " taps"]) -> Image:
    """Averages each pixel with the next pixels along a random direction.

    The pixels are chosen by ImageMagick's rule (MagickCore/effect.c, MotionBlurImage). Beyond the
    edge, the last pixel is repeated.
    """
    height, width, _ = image.shape
    angle = jnp.radians(jax.random.uniform(key, minval=-MAX_DEGREES, maxval=MAX_DEGREES))
    down, right = jnp.sin(angle), jnp.cos(angle)

    def add(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        place, weight = tap
        rows = jnp.arange(height) + jnp.ceil(place * down - 0.5).astype(jnp.int32)
        columns = jnp.arange(width) + jnp.ceil(place * right - 0.5).astype(jnp.int32)
        moved = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        return total + weight * moved, None

    places = jnp.arange(len(weights), dtype=jnp.float32)
    return jax.lax.scan(add, jnp.zeros_like(image), (places, weights))[0]


def zoom_blur(
    key: PRNGKeyArray,
    image: Image,
    rows: Float[Array, "zooms height height"],
    columns: Float[Array, "zooms width width"],
    weights: Float[Array, " zooms"],
) -> Image:
    """Computes the weighted sum of the image enlarged about its middle, by factors from 1 on."""
    del key
    return jnp.einsum("z,zih,hwc,zjw->ijc", weights, rows, image, columns)


FIRST_AMPLITUDE = 100.0  # the authors' wibbledecay starts there; the result is normalized


def fog(key: PRNGKeyArray, image: Image, amount: Number, decay: Number) -> Image:
    """Adds a cloud in [0, `amount`], and scales the sum to the largest value of the image."""
    height, width, _ = image.shape
    side = 1 << (max(height, width) - 1).bit_length()
    cloud = amount * plasma(key, side, decay)[:height, :width, None]
    largest = image.max()
    return (image + cloud) * largest / (largest + amount)


def plasma(key: PRNGKeyArray, side: int, decay: Number) -> Float[Array, "side side"]:
    """Draws a cloud in [0, 1] by the diamond-square algorithm on a torus (Fournier et al. 1982).

    Args:
      side: a power of two.
      decay: smoothness. When the grid's step halves, the random part gets `decay ** 2` times
        smaller, as in the authors' program.
    """
    grid, step, amplitude = jnp.zeros((side, side)), side, FIRST_AMPLITUDE
    while step >= 2:
        half = step // 2
        key, *keys = jax.random.split(key, 4)

        def moved(total: Array, key: Array, amplitude: Array = amplitude) -> Array:
            noise = jax.random.uniform(key, total.shape, minval=-1.0)
            return total / 4 + amplitude**2 * noise

        # Squares: the center of four corners. Rolls wrap around, so the cloud tiles.
        corners = grid[::step, ::step]
        square = corners + jnp.roll(corners, -1, 0)
        centers = moved(square + jnp.roll(square, -1, 1), keys[0])
        grid = grid.at[half::step, half::step].set(centers)
        # Diamonds: the middle of each edge, from two corners and two centers.
        above = centers + jnp.roll(centers, 1, 0) + corners + jnp.roll(corners, -1, 1)
        grid = grid.at[::step, half::step].set(moved(above, keys[1]))
        beside = centers + jnp.roll(centers, 1, 1) + corners + jnp.roll(corners, -1, 0)
        grid = grid.at[half::step, ::step].set(moved(beside, keys[2]))
        step, amplitude = half, amplitude / decay
    grid = grid - grid.min()
    return grid / grid.max()


def brightness(key: PRNGKeyArray, image: Image, more: Number) -> Image:
    """Raises the value V of HSV by `more`; hue and saturation stay. Black becomes grey."""
    del key
    value = image.max(axis=-1, keepdims=True)
    brighter = jnp.minimum(value + more, 1)
    return jnp.where(value > 0, image * (brighter / jnp.maximum(value, 1e-6)), brighter)


BLOCK = 8
# RGB to YCbCr and back (JFIF 1.02, from ITU-R BT.601).
TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
TO_RGB = np.linalg.inv(TO_YCC.astype(np.float64)).astype(np.float32)


def contrast(key: PRNGKeyArray, image: Image, factor: Number) -> Image:
    """Scales the distance of each channel from its mean by `factor`."""
    del key
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def pixelate(
    key: PRNGKeyArray,
    image: Image,
    rows: Float[Array, "height height"],
    columns: Float[Array, "width width"],
) -> Image:
    """Shrinks the image and enlarges it to its old size, with Pillow's box filter.

    The matrices contain both steps. Unlike Pillow, nothing is rounded between them.
    """
    del key
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns)


def jpeg_compression(
    key: PRNGKeyArray, image: Image, tables: Float[Array, "luma_and_chroma 8 8"]
) -> Image:
    """Applies the losses of baseline JPEG (ITU-T T.81), without writing a file.

    Color has half the rows and columns (4:2:0), coefficients of 8 x 8 blocks are rounded, and color
    is interpolated in decoding as libjpeg does.

    Args:
      tables: quantization tables, the steps to which coefficients are rounded.
    """
    del key
    height, width, _ = image.shape
    around = [(0, -height % (2 * BLOCK)), (0, -width % (2 * BLOCK)), (0, 0)]
    # An encoder gets bytes. The sides become multiples of 16: blocks of 8 at half resolution.
    pixels = jnp.pad(jnp.round(image * 255), around, mode="edge")
    ycc = jnp.round(pixels @ TO_YCC.T)
    luma = _blocks_rounded(ycc[..., 0] - 128, tables[0])
    half = (luma.shape[0] // 2, luma.shape[1] // 2)
    smaller = ycc[..., 1:].reshape(half[0], 2, half[1], 2, 2).mean(axis=(1, 3))
    chroma = jax.vmap(_blocks_rounded, (-1, None), -1)(jnp.round(smaller), tables[1])
    # The triangle filter of libjpeg's decoder is linear interpolation between centers of pixels.
    chroma = jax.image.resize(chroma, (*luma.shape, 2), "linear")
    rgb = jnp.concatenate([luma[..., None] + 128, chroma], axis=-1) @ TO_RGB.T
    return rgb[:height, :width] / 255


def _blocks_rounded(plane: Float[Array, "height width"], table: Array) -> Array:
    """Rounds the DCT coefficients of a plane with the mean 0 to multiples of `table`."""
    dct = jnp.asarray(dct_matrix())
    rows, columns = plane.shape[0] // BLOCK, plane.shape[1] // BLOCK
    blocks = plane.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)
    coefficients = jnp.round((dct @ blocks @ dct.T) / table) * table
    values = jnp.clip(jnp.round(dct.T @ coefficients @ dct), -128, 127)
    return values.swapaxes(1, 2).reshape(plane.shape)


def dct_matrix() -> Float[np.ndarray, "8 8"]:
    """Makes the matrix of the orthonormal cosine transform (DCT-II) of 8 values."""
    place = np.arange(BLOCK)
    matrix = np.cos(np.pi * (place + 0.5) * place[:, None] / BLOCK) * np.sqrt(2 / BLOCK)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 128

# (key, image float32 [h, w, 3] in [0, 1], *constants) -> image; it may leave [0, 1].
Corruption = Callable[..., Array]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def corrupt(
    images: UInt8[Array, "batch height width 3"],
    numbers: Int[Array, " batch"],
    name: str,
    severity: int,
    seed: int = 0,
) -> UInt8[Array, "batch height width 3"]:
    """Corrupts images; returns them rounded, with the sharding of `images`.

    Args:
      numbers: the number of each image in its split. The randomness of an image depends on its
        number, the seed, the name and the severity, and not on the batch.
      name, severity: a key of `CORRUPTIONS`, and one of `SEVERITIES`; else UserError.
    """
    check([name], [severity])
    height, width = images.shape[1:3]
    values = constants.of(name, severity, height, width, small=min(height, width) < SMALL_SIDE)
    tag = zlib.crc32(f"{name}:{severity}".encode())
    key = jax.random.fold_in(jax.random.key(seed), tag)
    return _corrupt(name, images, numbers, key, values)


@functools.partial(jax.jit, static_argnums=0)
def _corrupt(name: str, images: Array, numbers: Array, key: Array, values: Any) -> Array:
    # The constants are arguments, so that one compiled program serves all severities.
    def one(image: Array, number: Array) -> Array:
        image_key = jax.random.fold_in(key, number)
        pixels = CORRUPTIONS[name](image_key, image.astype(jnp.float32) / 255, *values)
        return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)

    return jax.vmap(one)(images, numbers)


def check(names: Sequence[str], severities: Sequence[int]) -> None:
    """Raises UserError for an unknown corruption or severity."""
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(unknown_key_message(str(name), CORRUPTIONS, "the corruptions"))
    for severity in severities:
        if severity not in SEVERITIES or isinstance(severity, bool | np.bool_):
            raise UserError(f"severities of corruptions are 1 to 5, got {severity!r}")
