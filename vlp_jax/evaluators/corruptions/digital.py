"""Digital corruptions: low contrast, low resolution, JPEG compression."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.evaluators.corruptions.noise import Image, Number

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
